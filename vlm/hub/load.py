"""`vlm.load`: a model from a SPEC; here a run folder or a model folder."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm.config.schema import ModelConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.heads.model import VisionLanguageModule, build_model
from vlm.inference import FORMAT_VERSION, VisionLanguageModel
from vlm.runtime.device import choose_device
from vlm.tokenizer import load_tokenizer

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def load(spec: str | Path, device: str = "auto") -> VisionLanguageModel:
    """A model, ready to use.

    Args:
        spec: A run folder, or a model folder that `VisionLanguageModel.save` wrote.
        device: auto | cpu | cuda | mps.

    Raises:
        ConfigError: There is no such folder, or it is not a model's.
        CheckpointError: A file of it is missing, damaged, or does not fit the others.
    """
    folder = find_model_folder(Path(spec))
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        names = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        raise CheckpointError(f"{folder}: {names} missing; a model folder needs {', '.join(FILES)}")
    config = _read_config(folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json", context_length=config.text.context_length)
    model = build_model(config, tokenizer)
    _load_weights(model, folder / "model.safetensors")
    return VisionLanguageModel(model, config, tokenizer, choose_device(device))


def find_model_folder(path: Path) -> Path:
    """The model folder that a path means: itself, or `model/` of a run folder."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a run folder or a model folder")
    if (path / "model").is_dir():
        return path / "model"
    if (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path}: this run has no model yet; it is written when training ends "
            f"(vlm train {path / 'config.yaml'} continues it)"
        )
    return path


def _read_config(path: Path) -> ModelConfig:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        if data["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version {data['format_version']}, this vlm reads {FORMAT_VERSION}"
            )
        return TypeAdapter(ModelConfig).validate_json(json.dumps(data["model"]))
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise CheckpointError(f"{path}: not a model's config: {_one_line(error)}") from error


def _load_weights(model: VisionLanguageModule, path: Path) -> None:
    try:
        weights = load_file(path)
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit config.json: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
