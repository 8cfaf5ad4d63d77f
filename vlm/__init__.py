"""Train, evaluate and use CLIP-style vision-language models; names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.config.load import load_config
    from vlm.config.schema import Config
    from vlm.eval.explain import Explanation, explain
    from vlm.eval.faithfulness import faithfulness
    from vlm.eval.suite import evaluate
    from vlm.heads.zero_shot import Prediction, ZeroShotClassifier
    from vlm.hub.load import load
    from vlm.inference import VisionLanguageModel
    from vlm.retrieval.index import Index
    from vlm.tokenizer import Tokenizer
    from vlm.training.loop import train

    __version__: str

__all__ = [
    "Config",
    "Explanation",
    "Index",
    "Prediction",
    "Tokenizer",
    "VisionLanguageModel",
    "ZeroShotClassifier",
    "__version__",
    "evaluate",
    "explain",
    "faithfulness",
    "load",
    "load_config",
    "train",
]

_MODULES = {
    "Config": "vlm.config.schema",
    "Explanation": "vlm.eval.explain",
    "Index": "vlm.retrieval.index",
    "Prediction": "vlm.heads.zero_shot",
    "Tokenizer": "vlm.tokenizer",
    "VisionLanguageModel": "vlm.inference",
    "ZeroShotClassifier": "vlm.heads.zero_shot",
    "evaluate": "vlm.eval.suite",
    "explain": "vlm.eval.explain",
    "faithfulness": "vlm.eval.faithfulness",
    "load": "vlm.hub.load",
    "load_config": "vlm.config.load",
    "train": "vlm.training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name == "__version__":
        value = importlib.import_module("vlm.runtime.version").installed_version()
    else:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}", name=name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
