"""Lets torchvision import beside a torch that it was not built for.

PyPI's torchvision is a CUDA build. Beside a CPU torch its C++ library cannot load, and `import
torchvision` dies with `operator torchvision::nms does not exist` (pytorch/vision#8985, #9077), and
with it timm, open_clip and transformers. Declaring the missing operators' schemas is enough for all
that this package uses; where torchvision's own operators load, nothing happens.
"""

import importlib
import re

import torch

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: list[torch.library.Library] = []  # kept: a collected Library takes its schemas with it


def install() -> None:
    """Import torchvision, declaring the operators it lacks; safe to call any number of times.

    Raises:
        RuntimeError: torchvision fails for another reason, or lacks an operator not known here.
    """
    while True:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = _MISSING.search(str(error))
            if missing is None or missing[1] not in _SCHEMAS:
                raise
            _declare(missing[1])
        else:
            return


def _declare(name: str) -> None:
    """Declare one operator, once: asking for it twice means that declaring it did not help."""
    if not _library:
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]  # torch's
    _library[0].define(_SCHEMAS.pop(name))  # type: ignore[no-untyped-call]  # torch's
