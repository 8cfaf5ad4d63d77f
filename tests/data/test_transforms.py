"""Transforms: open_clip's pixels for evaluation, torchvision's distribution for training."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data.transforms import EvalTransform, TrainTransform, normalize, random_crop
from vlm.runtime import torchvision_guard

torchvision_guard.install()
F = pytest.importorskip("torchvision.transforms.functional")

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(width, height, seed=0):
    """Smooth colours with detail on top, so that a wrong filter or a shift shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(256, size=(5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noise = rng.integers(-20, 20, size=smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encoded(image, fmt="PNG", **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def array(pixels):
    return pixels.permute(1, 2, 0).numpy().astype(int)


# --- evaluation ---------------------------------------------------------------------------------

SIZES = [(64, 64), (300, 200), (201, 333), (97, 98), (30, 31), (1000, 90), (7, 400), (224, 224)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("image_size", [32, 65, 224])
def test_eval_pixels_are_open_clips(image_size, resize_mode, interpolation):
    from open_clip.transform import image_transform

    reference = image_transform(
        image_size, is_train=False, resize_mode=resize_mode, interpolation=interpolation
    )
    reference.transforms = reference.transforms[:-2]  # all but ToTensor and Normalize
    transform = EvalTransform(image_size, resize_mode, interpolation)
    for width, height in SIZES:
        image = picture(width, height)
        if resize_mode == "longest" and min(width, height) * image_size < max(width, height):
            continue  # open_clip's side of no pixels is an error there
        expected = np.asarray(reference(image)).astype(int)
        assert np.array_equal(array(transform(encoded(image))), expected), (width, height)


def test_an_eval_jpeg_is_decoded_whole():
    data = encoded(picture(640, 480), "JPEG", quality=90)
    transform = EvalTransform(32)
    assert torch.equal(transform(data), transform(Image.open(io.BytesIO(data))))
    assert not torch.equal(transform(data), transform(_drafted(data)))


def _drafted(data):
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (32, 32))
    return image


def test_eval_takes_pictures_of_any_mode():
    red = Image.new("RGBA", (10, 20), (255, 0, 0, 0))  # transparent
    assert EvalTransform(8)(red).unique().tolist() == [255]
    assert EvalTransform(8)(Image.new("L", (9, 9), 7)).unique().tolist() == [7]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_eval_of_extreme_shapes_has_the_right_size(size, resize_mode):
    pixels = EvalTransform(16, resize_mode)(Image.new("RGB", size, "white"))
    assert pixels.shape == (3, 16, 16)
    assert pixels.max() == 255


# --- training -----------------------------------------------------------------------------------


def rng(seed=0):
    return np.random.default_rng(seed)


def whole(image_size, **options):
    """A transform whose crop is the whole square picture."""
    return TrainTransform(image_size, min_scale=1.0, max_aspect=1.0, **options)


def test_training_without_randomness_is_a_plain_resize():
    image = picture(64, 64)
    expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.array_equal(array(whole(48)(encoded(image), rng())), expected)


def test_training_pixels_depend_on_the_random_numbers_alone():
    transform = TrainTransform(
        32, min_scale=0.3, horizontal_flip=0.5, color_jitter=0.4, rotate_degrees=10.0, erase=0.5
    )
    data = encoded(picture(80, 60))
    first, again, other = (transform(data, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 80)])
def test_crops_are_distributed_as_torchvisions(width, height):
    from torchvision.transforms import RandomResizedCrop

    generator, image = rng(), torch.zeros(3, height, width)
    ours = np.array([random_crop(width, height, generator, 0.3, 4 / 3) for _ in range(2000)])
    ours = np.stack([ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], 1)
    torch.manual_seed(0)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, scale=[0.3, 1.0], ratio=[3 / 4, 4 / 3])
            for _ in range(2000)
        ]
    )  # top, left, height, width
    # torchvision rounds to pixels; five standard errors of 2,000 draws on top
    spread = theirs.std(axis=0)
    assert np.all(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 0.5 + 5 * spread / 2000**0.5)
    assert np.all(np.abs(ours.std(axis=0) - spread) < 0.3 + 0.12 * spread)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 5), (64, 64), (500, 400)])
def test_crops_lie_inside_and_keep_their_bounds(size):
    width, height = size
    generator = rng()
    for _ in range(200):
        left, top, right, bottom = random_crop(width, height, generator, 0.2, 1.5)
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= top < bottom <= height + 1e-9
        assert 1 / 1.5 - 1e-9 <= (right - left) / (bottom - top) <= 1.5 + 1e-9


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 5)])
def test_training_pixels_of_extreme_shapes_have_the_right_size(size):
    transform = TrainTransform(16, min_scale=0.1, rotate_degrees=5.0)
    assert transform(encoded(Image.new("RGB", size)), rng()).shape == (3, 16, 16)
    assert TrainTransform(16)(encoded(Image.new("RGB", size)), rng()).shape == (3, 16, 16)


@pytest.mark.parametrize("side", [70, 200, 1200])
def test_a_jpeg_is_decoded_at_the_scale_its_crop_needs(side):
    transform = TrainTransform(64, min_scale=0.3)
    data = encoded(picture(side, side), "JPEG", quality=90)
    for seed in range(5):
        decoded, box = transform._load(data, rng(seed))
        shorter = min(box[2] - box[0], box[3] - box[1])
        full = random_crop(side, side, rng(seed), 0.3, 4 / 3)
        shrink = round(side / decoded.width)
        assert shrink in (1, 2, 4, 8)
        assert min(full[2] - full[0], full[3] - full[1]) >= 64 * shrink or shrink == 1
        assert shorter < 2 * 64 or shrink == 8  # the next scale would be too small


def test_a_reduced_jpeg_shows_the_same_crop():
    image = picture(600, 600)
    transform = TrainTransform(64, min_scale=0.5)
    data = encoded(image, "JPEG", quality=95)
    for seed in range(5):
        reduced = array(transform(data, rng(seed)))
        exact = array(transform(image, rng(seed)))
        assert np.abs(reduced - exact).mean() < 2.5


def test_a_crop_is_upright():
    image = picture(600, 400)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    data = encoded(turned, "JPEG", quality=95, exif=exif.tobytes())
    transform = TrainTransform(32, min_scale=0.5)
    expected = array(transform(encoded(image, "JPEG", quality=95), rng(3)))
    assert np.abs(array(transform(data, rng(3))) - expected).mean() < 2.5


def test_a_reusable_picture_gives_what_its_bytes_give():
    transform = TrainTransform(32, min_scale=0.3)
    for fmt, size, reusable in [("JPEG", (63, 90), True), ("JPEG", (64, 64), False)]:
        data = encoded(picture(*size), fmt)
        opened = Image.open(io.BytesIO(data))
        assert transform.can_reuse(opened) == reusable
        if reusable:
            for seed in range(20):
                assert torch.equal(transform(data, rng(seed)), transform(opened, rng(seed)))


def test_flips_mirror_with_the_asked_probability():
    image = picture(32, 32)
    plain = whole(32)(image, rng())
    outcomes = [whole(32, horizontal_flip=0.25)(image, rng(seed)) for seed in range(200)]
    flipped = [torch.equal(pixels, plain.flip(2)) for pixels in outcomes]
    assert all(f or torch.equal(pixels, plain) for f, pixels in zip(flipped, outcomes, strict=True))
    assert 25 <= sum(flipped) <= 75


def test_color_jitter_is_saturation_contrast_brightness():
    image = Image.fromarray((np.asarray(picture(32, 32)) // 4 + 96).astype(np.uint8))  # unclipped
    for seed in range(10):
        generator = rng(seed)
        jittered = array(whole(32, color_jitter=0.4)(image, generator))
        draws = rng(seed)
        random_crop(32, 32, draws, 1.0, 1.0)
        brightness, contrast, saturation = 1 + 0.4 * (2 * draws.random(3) - 1)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
        expected = F.adjust_saturation(pixels, saturation)
        expected = F.adjust_contrast(expected, contrast)
        expected = F.adjust_brightness(expected, brightness) * 255
        assert np.abs(jittered - array(expected.round())).max() <= 2  # the mean is a whole number


def test_turning_matches_pillows_rotation_and_fills_with_white():
    image = picture(64, 64)
    for seed in range(5):
        generator = rng(seed)
        turned = array(whole(64, rotate_degrees=30.0)(image, generator))
        draws = rng(seed)
        random_crop(64, 64, draws, 1.0, 1.0)
        degrees = draws.uniform(-30, 30)
        expected = image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
        difference = np.abs(turned - np.asarray(expected).astype(int))
        assert np.mean(difference > 1) < 0.01  # pixels on the very border
        assert (turned[0, 0] == 255).all()


def test_turning_a_large_picture_keeps_its_crop():
    image = picture(512, 512)
    still = array(TrainTransform(64, min_scale=0.5)(image, rng(4)))
    nearly = array(TrainTransform(64, min_scale=0.5, rotate_degrees=1e-6)(image, rng(4)))
    assert np.abs(still - nearly).mean() < 2.5


def test_erasing_fills_one_rectangle_of_the_documented_area():
    image = Image.new("RGB", (64, 64), (1, 2, 3))
    areas = []
    for seed in range(100):
        pixels = array(whole(64, erase=0.5)(image, rng(seed)))
        rows, columns = np.nonzero((pixels != [1, 2, 3]).any(axis=2))
        if rows.size:
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            areas.append(height * width / 64**2)
            assert rows.size > 0.99 * height * width  # noise everywhere in it
    assert 30 <= len(areas) <= 70
    assert 0.01 < min(areas) < 0.1
    assert 0.25 < max(areas) < 0.36


# --- normalisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalised_values_are_torchvisions(memory_format):
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    images = images.expand(2, 3, 16, 16).contiguous(memory_format=memory_format)
    expected = F.normalize(images.float() / 255, MEAN, STD)
    normalized = normalize(images, MEAN, STD)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=memory_format)
    # four roundings of values below 4: 4 * 2^-23 at most
    assert (normalized - expected).abs().max() <= 1e-6
