import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from vlm.config.schema import CaptionerConfig, ImageConfig, ModelConfig, TextConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.heads.model import build_model
from vlm.inference import VisionLanguageModel
from vlm.tokenizer import train_bpe

TINY = ModelConfig(
    embed_dim=8,
    image=ImageConfig(
        image_size=16,
        pool="avg",
        kwargs={
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 8,
            "class_token": False,
        },
    ),
    text=TextConfig(context_length=12, width=16, depth=1, num_heads=2),
    captioner=CaptionerConfig(width=16, depth=1, num_heads=2),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    texts = ["a red bird", "a slice of pizza"]
    tokenizer = train_bpe(texts, vocab_size=300, context_length=12)
    return VisionLanguageModel(build_model(TINY, tokenizer), TINY, tokenizer, torch.device("cpu"))


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def pictures(n=3):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)) for _ in range(n)]


def test_a_saved_model_is_the_same_model(model, folder):
    again = vlm.load(folder, device="cpu")
    assert again.embed_images(pictures()).equal(model.embed_images(pictures()))
    assert again.embed_texts(["a red bird"]).equal(model.embed_texts(["a red bird"]))
    assert again.caption(pictures()) == model.caption(pictures())
    assert again.config == model.config


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError) as error:
        vlm.load(folder)
    assert error.value.problems == [
        f"{folder}: {name} is missing; a model folder needs config.json, model.safetensors, "
        "tokenizer.json"
    ]


def test_several_missing_files_are_missing(folder):
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r": config\.json, tokenizer\.json are missing; "):
        vlm.load(folder)


def test_weights_of_another_model_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["embed_dim"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not fit config\.json: "):
        vlm.load(folder)


def test_damaged_weights_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not fit config\.json: "):
        vlm.load(folder)


def test_an_unknown_setting_in_the_config_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["zzz"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: not a model's config: "):
        vlm.load(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError) as error:
        vlm.load(tmp_path / "nowhere")
    assert str(error.value) == (
        f"{tmp_path}/nowhere: no such folder; give a run folder or a model folder"
    )


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="this run has no model yet"):
        vlm.load(tmp_path)


def test_saving_does_not_overwrite(model, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        model.save(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_folder_can_be_moved(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert vlm.load(tmp_path / "elsewhere").embed_dim == 8
