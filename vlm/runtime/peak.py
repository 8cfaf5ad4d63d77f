"""How fast a device multiplies matrices at best: what a share of its peak is measured against."""

import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch

from vlm.runtime import onednn
from vlm.runtime.device import Precision, synchronize

_BUDGET_S = 0.25  # of a measurement
_LARGEST = 8192  # matrix

# Dense TFLOP/s of NVIDIA's data sheets, by words of the device's name; the first entry that fits
# counts. Where a precision is missing, the hardware has no unit for it.
_DATA_SHEETS: dict[str, dict[Precision, float]] = {
    "B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    "GH200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "H200 NVL": {"bf16": 835, "tf32": 418, "fp32": 60},
    "H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "H100 NVL": {"bf16": 835, "tf32": 418, "fp32": 60},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "tf32": 495, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A10G": {"bf16": 70, "tf32": 35, "fp32": 31.5},
    "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "RTX 4090": {"bf16": 165, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "tf32": 35.6, "fp32": 35.6},
    "V100 SXM2": {"fp32": 15.7},
    "V100 PCIE": {"fp32": 14},
    "T4": {"fp32": 8.1},
}
_SLOWER = {"MIG", "Laptop", "D", "Max"}  # words of what shares a name and not its data sheet


@dataclass(frozen=True)
class Peak:
    """A device's rate of matrix products.

    Attributes:
        flops_per_s: 2 a multiply-add.
        source: Where the number is from.
    """

    flops_per_s: float
    source: Literal["data sheet", "measured"]


@functools.cache
def peak_flops(device: torch.device, precision: Precision) -> Peak:
    """The data sheet's rate of a GPU that is known, else what a matrix product reaches in 0.3 s.

    Measured once a process. It is the rate of that moment: what else runs on the machine lowers it.
    """
    if device.type == "cuda":
        rate = data_sheet_rate(torch.cuda.get_device_name(device), precision)
        if rate is not None:
            return Peak(rate, "data sheet")
    return Peak(_measured_rate(device, precision), "measured")


def data_sheet_rate(name: str, precision: Precision) -> float | None:
    """FLOP/s of the GPU that `torch.cuda.get_device_name` calls so; None where that is unknown."""
    words = name.replace("-", " ").split()
    if _SLOWER & set(words):
        return None
    for known, rates in _DATA_SHEETS.items():
        if f" {known} " in f" {' '.join(words)} ":
            return rates[precision] * 1e12 if precision in rates else None
    return None


def _measured_rate(device: torch.device, precision: Precision) -> float:
    """The best of several products, of ever larger matrices while there is time for them."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size, best, left_s = 256, 0.0, _BUDGET_S
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    _seconds_of_product(matrix)  # loads the library
    while left_s > 0:
        seconds = _seconds_of_product(matrix)
        best = max(best, 2 * size**3 / seconds)
        left_s -= seconds
        if 4 * 8 * seconds < left_s and size < _LARGEST:  # room for four of twice the size
            size *= 2
            matrix = matrix.repeat(2, 2)
    return best


def _seconds_of_product(matrix: torch.Tensor) -> float:
    is_single = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    multiply = onednn.linear if is_single and onednn.is_quickest_in_fp32() else torch.matmul
    synchronize(matrix.device)
    start = time.perf_counter()
    multiply(matrix, matrix)
    synchronize(matrix.device)
    return time.perf_counter() - start
