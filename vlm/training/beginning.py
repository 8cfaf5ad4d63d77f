"""A run that begins with the weights of another: fine-tuning, or a head on frozen encoders."""

from pathlib import Path

import torch

from vlm.errors import ConfigError
from vlm.heads.model import VisionLanguageModule
from vlm.hub.load import load
from vlm.tokenizer import Tokenizer


def begin_with(module: VisionLanguageModule, spec: str | Path, tokenizer: Tokenizer) -> list[str]:
    """Give a model the weights of a run or model folder, and return the parts that have none there.

    Args:
        module: Keeps its own weights in parts that the folder lacks, as a captioner.
        spec: The folder.
        tokenizer: Of the module.

    Raises:
        ConfigError: A weight has another shape there, or the vocabulary is another.
    """
    model = load(spec, "cpu")
    if not model.tokenizer.has_vocabulary_of(tokenizer):
        raise ConfigError(
            f"train.init_from: {spec} has another vocabulary; "
            "set model.text.tokenizer to its tokenizer.json"
        )
    theirs, mine = model.model.state_dict(), module.state_dict()
    for name in sorted(theirs.keys() & mine.keys()):
        if theirs[name].shape != mine[name].shape:
            shapes = [tuple(weights[name].shape) for weights in (theirs, mine)]
            raise ConfigError(f"train.init_from: {name} is {shapes[0]} in {spec}, {shapes[1]} here")
    with torch.no_grad():
        for name in theirs.keys() & mine.keys():
            mine[name].copy_(theirs[name])
    return sorted({".".join(name.split(".")[:2]) for name in mine.keys() - theirs.keys()})
