"""Which device and which arithmetic to use."""

import contextlib
import os
import platform
import shutil
from importlib.util import find_spec
from typing import Literal

import torch

from vlm.errors import ConfigError

Precision = Literal["fp32", "tf32", "bf16"]


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `auto | cpu | cuda | mps` means here; on CUDA each rank has its own.

    Raises:
        ConfigError: The name is unknown or the device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((n for n, there in available.items() if there), "cpu")
    kind = name.split(":")[0]
    if kind not in ("cpu", *available):
        raise ConfigError(f'device "{name}" is none of auto, cpu, cuda, mps')
    if not available.get(kind, True):
        raise ConfigError(f"device {name} is not available on this machine; use device=auto")
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device} is not there: this machine has {torch.cuda.device_count()} GPUs; "
            "start no more processes than that on it (torchrun --nproc-per-node)"
        )
    return device


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile pays and works there: a GPU that Triton knows, and a C compiler."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    return find_spec("triton") is not None and any(map(shutil.which, compilers))


def memory_bytes(device: torch.device) -> int | None:
    """Of a GPU; None of what shares it with other processes."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def choose_precision(name: str, device: torch.device) -> Precision:
    """What `auto` means: bf16 where the hardware multiplies it natively, else fp32.

    Raises:
        ConfigError: TF32 asked for off CUDA, where it would be ignored.
    """
    if name == "tf32" and device.type != "cuda":
        raise ConfigError(f"train.precision=tf32 needs a CUDA device, not {device.type}; use fp32")
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    precision: Precision = name  # type: ignore[assignment]  # a Literal of the schema
    return precision


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def arithmetic(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """The autocast context of a forward pass; also sets what fp32 products and convolutions are."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # PyTorch's own default is True
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has no queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> str:
    """What computes here: the GPU, if it does, and the processor with its threads."""
    processor = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    there = f"{processor}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}, {there}" if device.type == "cuda" else there
