"""One rank of a run, with faults in it; see conftest.py, which sets the upper-case names."""

import os
import signal
import sys
import time
from dataclasses import dataclass, fields, replace

import torch

from vlm.cli.main import main
from vlm.errors import DataError
from vlm.runtime import distributed
from vlm.training import loop
from vlm.training.setup import build_parts
from vlm.training.step import TrainStep


def leave(step):
    os._exit(9)


def kill(step):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(step):
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(step):
    time.sleep(600)


def fail(step):
    raise ZeroDivisionError("a bug")


def damage(step):
    raise DataError("s-0.tar: is damaged on this rank")


def terminate(step):
    os.kill(os.getpid(), signal.SIGTERM)


def usr1(step):
    os.kill(os.getpid(), signal.SIGUSR1)


def spoil_loss(factor):
    def spoil(step):
        objective = step.objective

        def spoiled(*args):
            terms = objective(*args)
            return replace(terms, loss=terms.loss * factor)

        object.__setattr__(step, "objective", spoiled)
        return lambda: object.__setattr__(step, "objective", objective)

    return spoil


def spoil_gradient(factor):
    def spoil(step):
        parameter = step.module.encoders.text.norm.weight
        return parameter.register_hook(lambda gradient: gradient * factor).remove

    return spoil


def spoil_pixels(step):
    objective = step.objective
    object.__setattr__(step, "objective", replace(objective, mean=(float("nan"),) * 3))
    return lambda: object.__setattr__(step, "objective", objective)


def hundredfold_lr(step):
    optim = step.optim
    object.__setattr__(step, "optim", replace(optim, lr=100 * optim.lr))
    return lambda: object.__setattr__(step, "optim", optim)


FAULT = {
    "leave": leave,
    "kill": kill,
    "stop": stop,
    "sleep": sleep,
    "fail": fail,
    "damage": damage,
    "terminate": terminate,
    "usr1": usr1,
    "nan loss": spoil_loss(float("nan")),
    "inf loss": spoil_loss(float("inf")),
    "nan gradient": spoil_gradient(float("nan")),
    "inf gradient": spoil_gradient(float("inf")),
    "nan pixels": spoil_pixels,
    "hundredfold lr": hundredfold_lr,
}


@dataclass(frozen=True)
class FaultyStep(TrainStep):
    """A step before which faults happen, for this step alone."""

    def __call__(self, step, batch, **asked):
        here = (step + 1, distributed.rank())
        undo = [FAULT[name](self) for name, *where in FAULTS if tuple(where) == here]  # noqa: F821
        result = super().__call__(step, batch, **asked)
        for function in undo:
            if function is not None:
                function()
        return result


def build_faulty_parts(*args):
    parts = build_parts(*args)
    step = FaultyStep(**{f.name: getattr(parts.step, f.name) for f in fields(TrainStep)})
    return replace(parts, step=step)


if __name__ == "__main__":  # loader workers import this file, under another name
    for descriptor in (1, 2):
        os.dup2(os.open(LOG, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)  # noqa: F821
    os.setsid()
    os.environ.update(ENVIRONMENT)  # noqa: F821
    torch.set_num_threads(1)
    loop.build_parts = build_faulty_parts
    sys.exit(main(["train", *WORDS]))  # noqa: F821
