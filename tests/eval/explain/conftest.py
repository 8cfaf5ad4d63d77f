"""A model that knows what the coloured squares of a picture are called, and those that do not."""

import numpy as np
import pytest
import torch

from vlm.data.transforms import normalize

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "white": (255,) * 3}
SIDE, CELL = 32, 8


def paint(rng, num_objects=2):
    """Squares of different colours in cells of their own, and what is where."""
    grey = int(rng.integers(90, 160))
    picture = np.full((SIDE, SIDE, 3), grey, np.uint8)
    colours = rng.permutation(list(COLOURS))[:num_objects]
    objects = []
    for name, cell in zip(colours, rng.permutation(16), strict=False):
        x, y = int(cell % 4) * CELL, int(cell // 4) * CELL
        picture[y : y + CELL, x : x + CELL] = COLOURS[name]
        objects.append({"name": str(name), "box": [x, y, x + CELL, y + CELL]})
    return picture, objects


@pytest.fixture(scope="session")
def painted():
    """Makes a picture [32, 32, 3] of so many squares, of a seed, and the list of its objects."""
    return lambda seed, **options: paint(np.random.default_rng([seed, 1]), **options)


@pytest.fixture(scope="session")
def make_encoders():
    """Makes a model with random weights whose image encoder is as said."""
    from vlm.config.schema import ImageConfig, ModelConfig, TextConfig
    from vlm.heads.model import build_model
    from vlm.inference import VisionLanguageModel
    from vlm.tokenizer import train_bpe

    def make(seed=0, embed_dim=16, **image):
        torch.manual_seed(seed)
        kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": CELL}
        defaults = {"name": "vit_tiny_patch16_224", "image_size": SIDE, "kwargs": kwargs}
        config = ModelConfig(
            embed_dim=embed_dim,
            image=ImageConfig(**defaults | image),
            text=TextConfig(context_length=12, width=32, depth=1, num_heads=2),
        )
        texts = [f"a {colour} square" for colour in COLOURS]
        tokenizer = train_bpe(texts, vocab_size=280, context_length=12)
        network = build_model(config, tokenizer)
        return VisionLanguageModel(network, config, tokenizer, torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def learned(make_encoders):
    """Random features, and projections fitted to them in closed form. Not to be changed.

    A colour's code is a direction of its own, for texts and for pictures that have it.
    """
    kwargs = {"embed_dim": 96, "depth": 2, "num_heads": 2, "patch_size": CELL, "class_token": False}
    model = make_encoders(pool="avg", kwargs=kwargs)
    image, text, rng = (
        model.model.encoders.image,
        model.model.encoders.text,
        np.random.default_rng(0),
    )
    names, codes = list(COLOURS), torch.eye(16)
    pairs = [paint(rng, num_objects=number % 4) for number in range(600)]
    pixels = normalize(
        torch.from_numpy(np.stack([picture for picture, _ in pairs])).permute(0, 3, 1, 2),
        model.preprocess.mean,
        model.preprocess.std,
    )
    aims = [sum((codes[names.index(o["name"])] for o in objects), codes[9]) for _, objects in pairs]
    forms = ["{}", "a {}", "{} square", "a {} square"]
    texts = model.tokenizer([form.format(name) for form in forms for name in names])
    with torch.no_grad():
        text.token_embedding.weight.mul_(25)  # words that lie apart
        model.model.encoders.logit_scale.fill_(3.5)
        image.projection.weight.copy_(_fitted(image._pool(image.tokens(pixels)), torch.stack(aims)))
        hidden = _hidden(text, texts)
        text.projection.weight.copy_(_fitted(hidden, codes[: len(names)].repeat(len(forms), 1)))
    return model


def _hidden(text, tokens):
    """What the text encoder's projection gets."""
    found = []
    handle = text.projection.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    text(tokens)
    handle.remove()
    return found[0]


def _fitted(features, aims):
    """Least squares, with a ridge."""
    x, y = features.double(), aims.double()
    ridge = 1e-3 * len(x) * x.var() * torch.eye(x.shape[1])
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y).T
