"""A tiny model with random weights, and shards of coloured squares drawn by two artists."""

import io
import json

import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from vlm.config.schema import CaptionerConfig, ImageConfig, ModelConfig, TextConfig
from vlm.heads.model import build_model
from vlm.inference import VisionLanguageModel
from vlm.tokenizer import train_bpe

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
CAPTIONS = [f"a {colour} square" for colour in COLOURS]


def encoded(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def model():
    torch.set_num_threads(1)  # on tensors this small, threads only wait for one another
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=16,
        image=ImageConfig(
            name="vit_tiny_patch16_224",
            image_size=32,
            kwargs={"embed_dim": 32, "depth": 1, "num_heads": 2},
        ),
        text=TextConfig(context_length=24, width=32, depth=1, num_heads=2),
        captioner=CaptionerConfig(width=32, depth=1, num_heads=2),
    )
    tokenizer = train_bpe(CAPTIONS, vocab_size=300, context_length=24)
    return VisionLanguageModel(
        build_model(config, tokenizer), config, tokenizer, torch.device("cpu")
    )


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """12 pictures of 6 colours; `0-red` also has a caption that `1-red` lacks; one is broken."""
    path = tmp_path_factory.mktemp("data") / "squares-0000.tar"
    with TarWriter(str(path)) as writer:
        for artist in range(2):
            for colour in COLOURS:
                captions = [f"a {colour} square", f"artist {artist} paints {colour}"]
                meta = {"captions": captions, "label": colour, "concept": colour, "artist": artist}
                writer.write(
                    {
                        "__key__": f"{artist}-{colour}",
                        "png": encoded(colour),
                        "json": json.dumps(meta).encode(),
                    }
                )
        writer.write({"__key__": "broken", "png": encoded("red")[:-30], "json": b"{}"})
    return path
