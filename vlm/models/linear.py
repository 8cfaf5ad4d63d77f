"""Linear layers on the CPU, quicker by what oneDNN makes of their products.

In fp32 its products are taken where they beat those of PyTorch's library (`runtime/onednn.py`). In
bf16, autocast takes them already; there, the gradient of a weight is a product of two matrices that
both run along the rows of the batch, and with AMX oneDNN takes up to 1.5 times as long for it as
for the same product with one of them transposed, which is itself little work if it is done a piece
at a time, in the cache; without AMX it takes as long (benchmarks/quickstart_parts.py).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlm.runtime import onednn

_MIN_PRODUCTS = 2**27  # of fp32: below, the millisecond that oneDNN takes for a new shape counts
_MIN_ELEMENTS = 2**21  # of the narrower matrix: what a cache holds is not worth a copy
_PIECE = 256  # rows, which the cache holds


def quicken(module: nn.Module) -> None:
    """Make a module's linear layers quicker on this CPU, in fp32 and under autocast to bf16."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _QuickLinear  # names and shapes of weights stay


class _QuickLinear(nn.Linear):
    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
            quick = x.dtype == torch.bfloat16 and onednn.has_bf16()
        else:
            is_large = x.numel() * self.out_features >= _MIN_PRODUCTS
            quick = is_large and x.dtype == torch.float32 and onednn.is_quickest_in_fp32()
        if not quick or x.ndim < 2 or not x.numel():
            return super().forward(x)
        out: Tensor = _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # torch's own
        return out


class _Linear(torch.autograd.Function):
    """`F.linear` of fp32 weights, which are cast to the dtype of the rows, as autocast does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        # F.linear in bf16 writes the bias to all rows first, and then adds the product
        return onednn.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_out = gradients[0].flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            onednn.linear(of_out, weight.T).view_as(x) if of_x else None,
            weight_gradient(of_out, x.flatten(0, -2)) if of_weight else None,
            of_out.sum(0).float() if of_bias else None,
        )


def weight_gradient(of_out: Float[Tensor, "M N"], x: Float[Tensor, "M K"]) -> Float[Tensor, "N K"]:
    """The gradient of a linear layer's weight, in fp32.

    Args:
        of_out: The gradient of what comes out.
        x: What went in.
    """
    narrow, wide = sorted((of_out.shape[1], x.shape[1]))
    if x.dtype == torch.float32 or len(x) * narrow < _MIN_ELEMENTS or wide < 2 * narrow:
        return (of_out.T @ x).float()
    if x.shape[1] == wide:
        return (_transposed(of_out) @ x).float()
    return _transposed(_transposed(x) @ of_out, torch.float32)


def _transposed(matrix: Float[Tensor, "M K"], dtype: torch.dtype | None = None) -> Tensor:
    """A copy, by pieces that the cache holds; PyTorch's own reads all rows for each column."""
    num_rows, num_columns = matrix.shape
    rows = next(n for n in range(_PIECE, 0, -1) if num_rows % n == 0)
    pieces = matrix.reshape(-1, rows, num_columns).transpose(1, 2).contiguous()
    out = torch.empty(num_columns, len(pieces), rows, dtype=dtype or matrix.dtype)
    return out.copy_(pieces.transpose(0, 1)).view(num_columns, num_rows)
