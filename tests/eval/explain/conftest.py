"""A model that has learned, within seconds, what the coloured squares of a picture are called."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

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

    def make(seed=0, **image):
        torch.manual_seed(seed)
        kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": CELL}
        defaults = {"name": "vit_tiny_patch16_224", "image_size": SIDE, "kwargs": kwargs}
        config = ModelConfig(
            embed_dim=16,
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
    """A trained model. Not to be changed."""
    from vlm.data.transforms import normalize

    model = make_encoders()
    network, rng = model.model.train(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(150):
        pairs = [paint(rng) for _ in range(48)]
        images = torch.from_numpy(np.stack([picture for picture, _ in pairs])).permute(0, 3, 1, 2)
        pixels = normalize(images, model.preprocess.mean, model.preprocess.std)
        names = [f"a {objects[0]['name']} square" for _, objects in pairs]
        classes = sorted(set(names))
        texts = network.encoders.encode_text(model.tokenizer(classes), normalize=True)
        features = network.encoders.encode_image(pixels, normalize=True)
        logits = network.encoders.scale() * features @ texts.T
        loss = cross_entropy(logits, torch.tensor([classes.index(name) for name in names]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    network.zero_grad()
    return model
