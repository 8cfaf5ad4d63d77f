"""Which part of a training step runs now: marks that are there only while a run is profiled.

At any moment exactly one part runs, so the parts' times add up to the step's. Modules are marked by
hooks, methods by shadowing them on their object, and the parts of the backward pass by hooks on the
gradients of the parts' outputs: autograd goes back through what ran forward, last part first.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from vlm.heads.model import Outputs
from vlm.runtime.communication import heard_by
from vlm.runtime.device import synchronize
from vlm.training.step import TrainStep

DATA = "data wait"
TO_DEVICE = "host to device"
NORMALIZE = "normalise pixels"
FORWARD, BACKWARD = "forward: ", "backward: "
IMAGE, TEXT, CAPTIONER, LOSS = "image encoder", "text encoder", "captioner", "loss"
RECOMPUTED = f"{BACKWARD}recomputed forward"
CLIP, OPTIMIZER, AVERAGE = "gradient clipping", "optimizer", "averaging"
RANKS, OTHER = "waiting for other ranks", "other"
PARTS = (
    DATA,
    TO_DEVICE,
    NORMALIZE,
    *(FORWARD + name for name in (IMAGE, TEXT, CAPTIONER, LOSS)),
    *(BACKWARD + name for name in (LOSS, CAPTIONER, TEXT, IMAGE)),
    RECOMPUTED,
    CLIP,
    OPTIMIZER,
    AVERAGE,
    RANKS,
    OTHER,
)  # as they follow each other


class _Handle(Protocol):
    def remove(self) -> None: ...


class Marks:
    """A stopwatch that is handed from part to part.

    Args:
        device: That of the model; a part ends when the device has done its work.
        tracing: Whether each part is a range in the trace of `torch.profiler`.

    Attributes:
        part: That runs now.
        seconds: Of each part since `start`.
        text_length: Tokens to which the last step's texts were padded.
        captioned_rows: Of the last step.
        negatives: False texts of the last step.
        pictures: Of the last step; None for one each.
    """

    def __init__(self, device: torch.device, *, tracing: bool = False) -> None:
        self.device = device
        self.tracing = tracing
        self.seconds: dict[str, float] = defaultdict(float)
        self.text_length = 0
        self.captioned_rows = 0
        self.negatives = 0
        self.pictures: int | None = None
        self.part = OTHER
        self._interrupted = OTHER
        self._since = 0.0
        self._range: record_function | None = None

    def start(self, part: str) -> None:
        """A step begins, with this part."""
        self.seconds.clear()
        synchronize(self.device)
        self.part, self._since = part, time.perf_counter()
        self._open()

    def stop(self) -> None:
        """The step has ended."""
        self.switch(OTHER)
        self._close()

    def switch(self, part: str) -> None:
        """From now on, this part runs."""
        synchronize(self.device)
        self._close()
        now = time.perf_counter()
        self.seconds[self.part] += now - self._since
        self.part, self._since = part, now
        self._open()

    def enter(self, part: str) -> None:
        """A part runs; one of the forward pass may run again within the backward pass."""
        again = self.in_backward and (part == NORMALIZE or part.startswith(FORWARD))
        self.switch(RECOMPUTED if again else part)

    def leave(self) -> None:
        """It has ended; what follows in the backward pass is the loss's, until a gradient comes."""
        self.switch(BACKWARD + LOSS if self.in_backward else OTHER)

    def begin(self) -> None:
        """Whatever runs waits for other ranks."""
        if self.part != RANKS:
            self._interrupted = self.part
            self.switch(RANKS)

    def end(self) -> None:
        """It goes on."""
        if self.part == RANKS:
            self.switch(self._interrupted)

    @property
    def in_backward(self) -> bool:
        """Whether gradients are being computed."""
        return self.part.startswith(BACKWARD)

    def at_gradient(self, output: Tensor | None, part: str) -> None:
        """The part's backward pass begins when the gradient of its output is there."""
        if output is None or not output.requires_grad or self.in_backward:
            return

        def begin(_: Tensor) -> None:
            self.switch(BACKWARD + part)

        output.register_hook(begin)  # type: ignore[no-untyped-call]  # torch's own

    def marked(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, as the part that it is."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            result = function(*args, **kwargs)
            self.leave()
            return result

        return run

    def _open(self) -> None:
        if self.tracing:
            self._range = record_function(self.part)
            self._range.__enter__()  # type: ignore[no-untyped-call]  # torch's own

    def _close(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


@contextmanager
def marked(step: TrainStep, marks: Marks) -> Iterator[None]:
    """Within the block the step tells `marks` which of its parts runs; afterwards it is as before.

    The backward pass runs on the calling thread, as the ranges of a trace must begin and end there.
    """
    with ExitStack() as stack:
        for handle in _hooks(step, marks):
            stack.callback(handle.remove)
        for owner, method, part in (
            (step.objective, "_pairs", FORWARD + LOSS),
            (step, "_clip", CLIP),
            (step.averaged, "update", AVERAGE),
        ):
            if owner is not None:
                stack.enter_context(
                    shadowed(owner, method, marks.marked(getattr(owner, method), part))
                )
        stack.enter_context(shadowed(step.objective, "_contrastive", _contrastive(step, marks)))
        stack.enter_context(heard_by(marks))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


@contextmanager
def shadowed(owner: object, method: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Put a function in front of one object's method; past the guard of a frozen dataclass."""
    vars(owner)[method] = replacement
    try:
        yield
    finally:
        del vars(owner)[method]


def _contrastive(step: TrainStep, marks: Marks) -> Callable[..., Tensor]:
    run = marks.marked(step.objective._contrastive, FORWARD + LOSS)

    def contrastive(*args: Any) -> Tensor:
        loss: Tensor = run(*args)
        marks.at_gradient(loss, LOSS)
        return loss

    return contrastive


def _hooks(step: TrainStep, marks: Marks) -> Iterator[_Handle]:
    """Place the hooks on the model's parts and on the optimisers."""
    module = step.module
    yield module.register_forward_pre_hook(_begin_model(marks), with_kwargs=True)
    yield module.register_forward_hook(_end_model(marks))
    parts = {IMAGE: module.encoders.image, TEXT: module.encoders.text, CAPTIONER: module.captioner}
    for name, part in parts.items():
        if part is not None:
            yield part.register_forward_pre_hook(_begin_part(marks, name))
            # always: where a forward pass is recomputed, it ends once it has made what was missing
            yield part.register_forward_hook(_end_part(marks, name), always_call=True)
    for optimizer in step.optimizers:
        yield optimizer.register_step_pre_hook(lambda *_: marks.switch(OPTIMIZER))
        yield optimizer.register_step_post_hook(lambda *_: marks.switch(OTHER))


def _begin_model(marks: Marks) -> Callable[..., Any]:
    def begin(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _, tokens, captions, _ = args
        marks.text_length = tokens.shape[1]
        marks.captioned_rows = 0 if captions is None else len(captions.inputs)
        negatives, has_picture = kwargs["negatives"], kwargs["has_picture"]
        marks.negatives = 0 if negatives is None else len(negatives)
        marks.pictures = None if has_picture is None else int(has_picture.sum())
        return args, {**kwargs, "prepare": marks.marked(kwargs["prepare"], NORMALIZE)}

    return begin


def _end_model(marks: Marks) -> Callable[..., None]:
    def end(_: nn.Module, __: object, outputs: Outputs) -> None:
        marks.switch(OTHER)
        marks.at_gradient(outputs.caption_loss, LOSS)
        marks.at_gradient(outputs.language_loss, LOSS)
        marks.at_gradient(outputs.negative, LOSS)

    return end


def _begin_part(marks: Marks, name: str) -> Callable[..., None]:
    return lambda *_: marks.enter(FORWARD + name)


def _end_part(marks: Marks, name: str) -> Callable[..., None]:
    def end(_: nn.Module, __: object, output: Any) -> None:
        features = output[0] if isinstance(output, tuple) else output
        marks.at_gradient(features, name)
        marks.leave()
        if name == CAPTIONER and not marks.in_backward:
            marks.switch(FORWARD + LOSS)  # the cross-entropy comes next

    return end
