"""Exposed communication: the time in which calculating stands still for what other ranks send.

What is sent while something is calculated costs nothing, and isn't counted. A wait is timed where
it holds the calculation up: on the CPU by the clock, on CUDA by events of the stream that
calculates, so that nothing is synchronised for it. Of FSDP2 on CUDA it is an upper bound: copies
into and out of what is sent are counted, too.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable


@runtime_checkable
class Listener(Protocol):
    """Is told when a wait begins and ends; an end without a beginning is nothing."""

    def begin(self) -> None:
        """From here on nothing is calculated."""

    def end(self) -> None:
        """What was waited for is there."""


class Clock:
    """Adds up the waits that it hears of.

    Args:
        device: That calculates.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._since: Any = None
        self._waits: list[tuple[Any, Any]] = []  # seconds, or events

    def begin(self) -> None:
        """From here on nothing is calculated."""
        if self._since is None:
            self._since = self._now()

    def end(self) -> None:
        """What was waited for is there."""
        if self._since is not None:
            self._waits.append((self._since, self._now()))
            self._since = None

    @property
    def seconds(self) -> float:
        """Of all waits; the device must have come to the end of the last."""
        if self.device.type == "cuda":
            return sum((begun.elapsed_time(ended) for begun, ended in self._waits), 0.0) / 1000
        return sum((ended - begun for begun, ended in self._waits), 0.0)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
        event.record()
        return event


_listeners: list[Listener] = []  # as the process group, one for the process


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within the block it is told of every wait."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """What is inside of the block only waits for other ranks; of one rank nothing is."""
    _begin()
    yield
    _end()


def backward(loss: Tensor) -> None:
    """Compute the gradients; DDP and FSDP2 wait for those of other ranks when theirs are there.

    Both do so in callbacks at the end of autograd's work, which come after this one's.
    """
    if dist.is_initialized():
        _at_gradient(loss, lambda: Variable._execution_engine.queue_callback(_begin))
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    _end()


def listen_to(module: nn.Module) -> None:
    """Notice when a module that `fully_shard` has changed waits for weights or for gradients.

    FSDP2 gathers weights in the module's first forward hook, and in a hook on the gradients of what
    comes out. It sends gradients between those of what goes into its own hook and of what comes out
    of that. Hooks around these hear all of it.
    """
    untraced: Callable[..., Any] = torch.compiler.disable
    module.register_forward_pre_hook(untraced(_goes_in), prepend=True, with_kwargs=True)
    module.register_forward_pre_hook(untraced(_has_weights), with_kwargs=True)
    module.register_forward_hook(untraced(_comes_out(_begin)), prepend=True)
    module.register_forward_hook(untraced(_comes_out(_end)))


def _goes_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tensor in _learning((args, kwargs)):
        _at_gradient(tensor, _end)
    _begin()


def _has_weights(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _end()
    inputs = _learning((args, kwargs))
    left = len(inputs)

    def begin_after_the_last() -> None:
        nonlocal left
        left -= 1
        if not left:
            _begin()

    for tensor in inputs:
        _at_gradient(tensor, begin_after_the_last)


def _comes_out(then: Callable[[], None]) -> Callable[..., None]:
    def hook(_: nn.Module, __: object, output: Any) -> None:
        for tensor in _learning(output):
            _at_gradient(tensor, then)

    return hook


def _learning(values: Any) -> list[Tensor]:
    """The tensors in what a module takes or returns that will have a gradient, as FSDP2 sees it."""
    if isinstance(values, Tensor):
        return [values] if values.requires_grad else []
    if is_dataclass(values):
        values = vars(values)
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return []
    return [tensor for value in values for tensor in _learning(value)]


def _at_gradient(tensor: Tensor, then: Callable[[], None]) -> None:
    tensor.register_hook(lambda _: then())  # type: ignore[no-untyped-call]  # torch's own


def _begin() -> None:
    for listener in _listeners:
        listener.begin()


def _end() -> None:
    for listener in _listeners:
        listener.end()
