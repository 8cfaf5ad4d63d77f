import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.config.schema import ImageConfig, ModelConfig, TextConfig
from vlm.errors import ConfigError, DataError
from vlm.heads.model import build_model
from vlm.inference import VisionLanguageModel
from vlm.tokenizer import train_bpe

KWARGS = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "class_token": False}
TINY = ModelConfig(
    embed_dim=8,
    image=ImageConfig(image_size=16, pool="avg", kwargs=KWARGS),
    text=TextConfig(context_length=12, width=16, depth=1, num_heads=2),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = train_bpe(["a red bird"], vocab_size=280, context_length=12)
    return VisionLanguageModel(build_model(TINY, tokenizer), TINY, tokenizer, torch.device("cpu"))


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8))


def test_every_kind_of_picture_has_the_same_features(model, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    array = np.array(picture)
    kinds = [
        picture,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        buffer.getvalue(),
        array,
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    expected = model.embed_images(picture)
    assert expected.shape == (1, 8)
    for features in (model.embed_images(kinds), model.embed_images(k for k in kinds)):
        torch.testing.assert_close(features, expected.expand(6, 8), rtol=0, atol=1e-6)


def test_features_have_length_one_and_are_fp32_on_the_cpu(model, picture):
    for features in (model.embed_images([picture]), model.embed_texts(["a red bird", ""])):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))


def test_nothing_in_gives_nothing_out(model):
    assert model.embed_images([]).shape == (0, 8)
    assert model.embed_texts([]).shape == (0, 8)


def test_batch_size_does_not_matter(model, picture):
    texts = [f"a bird {'very ' * n}red" for n in (3, 0, 6, 1, 5, 2, 4)]
    alone = torch.cat([model.embed_texts(text) for text in texts])
    for size in (2, 256):  # which are sorted by length, and put back
        torch.testing.assert_close(
            model.embed_texts(iter(texts), batch_size=size), alone, rtol=1e-5, atol=1e-6
        )


def test_encode_is_embed_without_preprocessing(model, picture):
    pixels = model.transform(picture)[None].float() / 255
    image = model.preprocess
    pixels = (pixels - torch.tensor(image.mean).view(3, 1, 1)) / torch.tensor(image.std).view(
        3, 1, 1
    )
    features = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(features, model.embed_images(picture), rtol=1e-5, atol=1e-5)
    raw = model.encode_text(model.tokenizer(["a red bird"]))
    torch.testing.assert_close(
        torch.nn.functional.normalize(raw, dim=1), model.embed_texts("a red bird")
    )


def test_classify_ranks_all_labels(model, picture):
    (prediction,) = model.classify(picture, ["bird", "pizza"], templates="none")
    assert prediction.label == prediction.ranking[0][0]
    assert sum(p for _, p in prediction.ranking) == pytest.approx(1)


def test_a_classifier_of_another_model_of_equal_width_is_refused(model, picture):
    torch.manual_seed(1)
    network = build_model(TINY, model.tokenizer)
    other = VisionLanguageModel(network, TINY, model.tokenizer, torch.device("cpu"))
    classifier = model.classifier(["bird", "pizza"])
    assert model.classify(picture, classifier) == model.classify(picture, ["bird", "pizza"])
    with pytest.raises(ConfigError, match=r"of another model: .*model\.classifier\(labels\)"):
        other.classify(picture, classifier)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), "must be uint8 [H, W, 3] (array) or [3, H, W] (tensor)"),
        (torch.zeros(3, 4, 4), "preprocessed floats go to encode_image"),
        ("nowhere.jpg", "nowhere.jpg: cannot read: No such file or directory"),
    ],
)
def test_what_is_no_picture_is_refused(model, image, message):
    with pytest.raises(ConfigError) as error:
        model.embed_images([image])
    assert message in str(error.value)


def test_without_a_captioner_captioning_says_so(model, picture):
    with pytest.raises(ConfigError, match="this model has no captioner"):
        model.caption(picture)


def test_a_broken_picture_is_named(model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"nope")
    with pytest.raises(DataError) as error:
        model.embed_images([tmp_path / "broken.jpg"])
    assert str(error.value) == (
        f"{tmp_path}/broken.jpg: no readable picture: image.format: not a picture of a known format"
    )
