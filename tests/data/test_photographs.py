"""Transforms on photographs: training close to Pillow's bicubic, evaluation open_clip's bits."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.data.order import draws_of_visit
from vlm.data.transforms import EvalTransform, TrainTransform
from vlm.runtime import torchvision_guard

torchvision_guard.install()

PHOTOGRAPHS = sorted((Path(__file__).parent / "photographs").glob("*.jpg"))  # 300, 400, 512 px


def difference_from_pillow(transform, data, seed):
    """Mean grey levels between the crop and Pillow's of the same box, decoded whole."""
    pixels = transform(data, draws_of_visit(seed, 0, 0))
    source, box = transform.load(data, draws_of_visit(seed, 0, 0))
    whole = Image.open(BytesIO(data))
    x, y = whole.width / source.shape[1], whole.height / source.shape[0]
    box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    size = (transform.image_size, transform.image_size)
    expected = np.asarray(whole.resize(size, Image.Resampling.BICUBIC, box))
    return np.abs(pixels.astype(int) - expected).mean()


@pytest.mark.parametrize("image_size", [64, 112, 224, 336])  # DCT scales 1/4 to 1, enlarging too
@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_a_training_crop_is_pillows_bicubic_within_3_grey_levels(path, image_size):
    data, transform = path.read_bytes(), TrainTransform(image_size, min_scale=0.5)
    differences = [difference_from_pillow(transform, data, seed) for seed in range(10)]
    assert np.mean(differences) < 3


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_eval_pixels_of_photographs_are_open_clips(resize_mode, interpolation):
    from open_clip.transform import image_transform

    reference = image_transform(
        224, is_train=False, resize_mode=resize_mode, interpolation=interpolation
    )
    reference.transforms = reference.transforms[:-2]  # all but ToTensor and Normalize
    transform = EvalTransform(224, resize_mode, interpolation)
    for path in PHOTOGRAPHS:
        pixels = transform(path.read_bytes()).permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, np.asarray(reference(Image.open(path)))), path.stem
