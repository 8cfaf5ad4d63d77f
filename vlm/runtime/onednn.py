"""Matrix products on the CPU by oneDNN, where PyTorch would take another library."""

import functools

import torch
from torch import Tensor


@functools.cache
def has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def is_quickest_in_fp32() -> bool:
    """Whether it multiplies fp32 faster than the library that PyTorch takes for it, which is MKL.

    MKL is Intel's and leaves much of other processors unused: on one of AMD's with AVX-512, oneDNN
    takes three quarters of its time (benchmarks/quickstart_parts.py).
    """
    processor = torch.cpu.get_capabilities()
    return bool(
        torch._C._has_mkldnn
        and torch._C.has_mkl
        and processor.get("avx512_f")
        and processor.get("cpu_name", "").startswith("AMD")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tensors of one dtype, with the bias in the product: no pass of its own."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
