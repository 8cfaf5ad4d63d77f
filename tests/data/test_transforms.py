"""Transforms: open_clip's pixels for evaluation, torchvision's distribution for training."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data.decode import decode_image
from vlm.data.order import draws_of_visit
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
    """As signed numbers, channels last."""
    pixels = pixels.permute(1, 2, 0) if isinstance(pixels, torch.Tensor) else pixels
    return np.asarray(pixels).astype(int)


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


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_a_box_is_placed_where_its_pixels_come_to_lie(resize_mode):
    picture = np.zeros((60, 120, 3), np.uint8)
    picture[12:36, 48:84] = 255
    transform = EvalTransform(40, resize_mode=resize_mode)
    pixels = transform(Image.fromarray(picture))[0].float()
    left, top, right, bottom = transform.place((48.0, 12.0, 84.0, 36.0), 120, 60)
    middles = torch.arange(40) + 0.5
    rows, columns = (pixels > 127).any(dim=1), (pixels > 127).any(dim=0)
    assert torch.equal(rows, (middles >= top) & (middles < bottom))
    assert torch.equal(columns, (middles >= left) & (middles < right))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_eval_of_extreme_shapes_has_the_right_size(size, resize_mode):
    pixels = EvalTransform(16, resize_mode)(Image.new("RGB", size, "white"))
    assert pixels.shape == (3, 16, 16)
    assert pixels.max() == 255


# --- training -----------------------------------------------------------------------------------


def draws(seed=0):
    return draws_of_visit(seed, 0, 0)


def whole(image_size, **options):
    """A transform whose crop is the whole square picture."""
    return TrainTransform(image_size, min_scale=1.0, max_aspect=1.0, **options)


@pytest.mark.parametrize("size", [24, 48, 64, 96])
def test_training_without_randomness_is_a_plain_resize(size):
    image = picture(64, 64)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    difference = array(whole(size)(encoded(image), draws())) - expected
    assert abs(difference.mean()) < 0.1  # no change of brightness
    assert np.abs(difference).mean() < 3  # a shift by half a pixel costs 5


def test_training_pixels_depend_on_the_random_numbers_alone():
    transform = TrainTransform(
        32, min_scale=0.3, horizontal_flip=0.5, color_jitter=0.4, rotate_degrees=10.0, erase=0.5
    )
    data = encoded(picture(80, 60))
    first, again, other = (transform(data, draws(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 80)])
def test_crops_are_distributed_as_torchvisions(width, height):
    from torchvision.transforms import RandomResizedCrop

    generator, image = draws(), torch.zeros(3, height, width)
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
    generator = draws()
    for _ in range(200):
        left, top, right, bottom = random_crop(width, height, generator, 0.2, 1.5)
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= top < bottom <= height + 1e-9
        assert 1 / 1.5 - 1e-9 <= (right - left) / (bottom - top) <= 1.5 + 1e-9


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 5)])
def test_training_pixels_of_extreme_shapes_have_the_right_size(size):
    transform = TrainTransform(16, min_scale=0.1, rotate_degrees=5.0)
    assert transform(encoded(Image.new("RGB", size)), draws()).shape == (16, 16, 3)
    assert TrainTransform(16)(encoded(Image.new("RGB", size)), draws()).shape == (16, 16, 3)


@pytest.mark.parametrize("side", [70, 200, 1200])
def test_a_jpeg_is_decoded_at_the_scale_its_crop_needs(side):
    transform = TrainTransform(64, min_scale=0.3)
    data = encoded(picture(side, side), "JPEG", quality=90)
    for seed in range(5):
        decoded, box = transform.load(data, draws(seed))
        shorter = min(box[2] - box[0], box[3] - box[1])
        full = random_crop(side, side, draws(seed), 0.3, 4 / 3)
        shrink = round(side / decoded.shape[1])
        assert shrink in (1, 2, 4, 8)
        assert min(full[2] - full[0], full[3] - full[1]) >= 64 * shrink or shrink == 1
        assert shorter < 2 * 64 or shrink == 8  # the next scale would be too small


def test_a_reduced_jpeg_shows_the_same_crop():
    image = picture(600, 600)
    transform = TrainTransform(64, min_scale=0.5)
    data = encoded(image, "JPEG", quality=95)
    for seed in range(5):
        reduced = array(transform(data, draws(seed)))
        exact = array(transform(np.asarray(image), draws(seed)))
        assert np.abs(reduced - exact).mean() < 2.5


def test_a_crop_is_upright():
    image = picture(600, 400)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    data = encoded(turned, "JPEG", quality=95, exif=exif.tobytes())
    transform = TrainTransform(32, min_scale=0.5)
    expected = array(transform(encoded(image, "JPEG", quality=95), draws(3)))
    assert np.abs(array(transform(data, draws(3))) - expected).mean() < 2.5


def test_a_reusable_picture_gives_what_its_bytes_give():
    transform = TrainTransform(32, min_scale=0.3)
    for fmt, size, reusable in [("JPEG", (63, 90), True), ("JPEG", (64, 64), False)]:
        data = encoded(picture(*size), fmt)
        assert transform.can_reuse(*size) == reusable
        decoded = np.asarray(decode_image(data))
        if reusable:
            for seed in range(20):
                again = transform(decoded, draws(seed))
                assert np.array_equal(transform(data, draws(seed)), again)


def test_flips_mirror_with_the_asked_probability():
    image = np.asarray(picture(32, 32))
    outcomes = [whole(32, horizontal_flip=0.25)(image, draws(seed)) for seed in range(200)]
    flipped = [np.array_equal(pixels, image[:, ::-1]) for pixels in outcomes]
    assert all(
        f or np.array_equal(pixels, image) for f, pixels in zip(flipped, outcomes, strict=True)
    )
    assert 25 <= sum(flipped) <= 75


def test_color_jitter_is_saturation_contrast_brightness():
    image = np.asarray(picture(32, 32)) // 4 + 96  # unclipped
    for seed in range(10):
        jittered = array(whole(32, color_jitter=0.4)(image, draws(seed)))
        numbers = draws(seed)
        random_crop(32, 32, numbers, 1.0, 1.0)
        brightness, contrast, saturation = (1 + 0.4 * (2 * next(numbers) - 1) for _ in range(3))
        pixels = torch.from_numpy(image).permute(2, 0, 1).double() / 255
        expected = F.adjust_saturation(pixels, saturation)
        expected = F.adjust_contrast(expected, contrast)
        expected = F.adjust_brightness(expected, brightness) * 255
        assert np.abs(jittered - array(expected.round())).max() <= 2  # the mean is a whole number


def test_turning_matches_pillows_rotation_and_fills_with_white():
    image = picture(64, 64)
    for seed in range(5):
        turned = array(whole(64, rotate_degrees=30.0)(np.asarray(image), draws(seed)))
        numbers = draws(seed)
        random_crop(64, 64, numbers, 1.0, 1.0)
        degrees = 30 * (2 * next(numbers) - 1)
        expected = image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
        difference = np.abs(turned - np.asarray(expected).astype(int))
        assert np.mean(difference > 1) < 0.05  # the border, which is mixed with the white
        assert (turned[0, 0] == 255).all()


def test_turning_a_large_picture_keeps_its_crop():
    image = np.asarray(picture(512, 512))
    still = array(TrainTransform(64, min_scale=0.5)(image, draws(4)))
    nearly = array(TrainTransform(64, min_scale=0.5, rotate_degrees=1e-6)(image, draws(4)))
    assert np.abs(still - nearly).mean() < 2.5


def test_erasing_fills_one_rectangle_of_the_documented_area():
    image = np.full((64, 64, 3), (1, 2, 3), dtype=np.uint8)
    areas = []
    for seed in range(100):
        pixels = array(whole(64, erase=0.5)(image, draws(seed)))
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
