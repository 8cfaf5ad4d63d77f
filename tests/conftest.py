"""What all tests share: a tiny model, shards of squares, what a missing program means."""

import io
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from vlm.runtime import torchvision_guard

torchvision_guard.install()
torch.set_num_threads(1)  # tests are small, and run side by side

NOT_INSTALLED = " is not installed"
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def pytest_addoption(parser):
    parser.addoption(
        "--require-system", action="store_true", help="fail where a system program is missing"
    )


def pytest_collection_modifyitems(config, items):
    if "long" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long form: make test-long"))


def pytest_runtest_setup(item):
    for mark in item.iter_markers("system"):
        if not mark.args:
            pytest.fail('the mark needs a program: @pytest.mark.system("strace")')
        for program in mark.args:
            if not shutil.which(program):
                stop = pytest.fail if item.config.option.require_system else pytest.skip
                stop(f"{program}{NOT_INSTALLED}")


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("skipped", [])
    reasons = (r.longrepr[2].removeprefix("Skipped: ") for r in reports)
    for reason, count in Counter(r for r in reasons if r.endswith(NOT_INSTALLED)).items():
        terminalreporter.write_line(f"{count} skipped: {reason}", yellow=True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def encoded():
    """A square of a colour as PNG bytes."""

    def encoded(colour, width=40):
        buffer = io.BytesIO()
        Image.new("RGB", (width, 36), colour).save(buffer, "PNG")
        return buffer.getvalue()

    return encoded


@pytest.fixture(scope="session")
def make_model():
    """Makes tiny models with random weights, equal each time."""
    # Imported here: the tests of rooms that know no model start without timm.
    from vlm.config.schema import CaptionerConfig, ImageConfig, ModelConfig, TextConfig
    from vlm.heads.model import build_model
    from vlm.inference import VisionLanguageModel
    from vlm.tokenizer import train_bpe

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
    texts = [f"a {colour} square" for colour in COLOURS]

    def make_model(*, captioner=True):
        torch.manual_seed(0)
        settings = config if captioner else replace(config, captioner=None)
        tokenizer = train_bpe(texts, vocab_size=300, context_length=24)
        network = build_model(settings, tokenizer)
        return VisionLanguageModel(network, settings, tokenizer, torch.device("cpu"))

    return make_model


@pytest.fixture(scope="session")
def model(make_model):
    """A tiny model with a captioner. Not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def shards(encoded, tmp_path_factory):
    """12 pictures of 6 colours; `0-red` also has a caption that `1-red` lacks; one is broken."""
    path = tmp_path_factory.mktemp("data") / "squares-0000.tar"
    with TarWriter(str(path)) as writer:
        for artist in range(2):
            for colour in COLOURS:
                captions = [f"a {colour} square", f"artist {artist} paints {colour}"]
                meta = {"captions": captions, "label": colour, "concept": colour, "artist": artist}
                fields = {"png": encoded(colour), "json": json.dumps(meta).encode()}
                writer.write({"__key__": f"{artist}-{colour}", **fields})
        writer.write({"__key__": "broken", "png": encoded("red")[:-30], "json": b"{}"})
    return path
