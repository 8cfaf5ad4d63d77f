"""A device's peak: out of its data sheet, or measured."""

import time

import pytest
import torch

from vlm.runtime.peak import data_sheet_rate, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
    ],
)
def test_a_known_gpu_has_the_rate_of_its_data_sheet(name, precision, tflops):
    assert data_sheet_rate(name, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Tesla V100-SXM2-16GB", "bf16"),  # has no unit for it
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),  # a seventh
        ("NVIDIA GeForce GTX 1080", "fp32"),
    ],
)
def test_what_no_data_sheet_tells_is_measured(name, precision):
    assert data_sheet_rate(name, precision) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_is_measured_in_a_moment(precision):
    start = time.perf_counter()
    peak = peak_flops(torch.device("cpu"), precision)
    assert time.perf_counter() - start < 3  # 0.3 s, on a machine that has nothing else to do
    assert peak.source == "measured"
    assert 1e7 < peak.flops_per_s < 1e15


def test_no_product_is_faster_than_the_measured_peak():
    """Machines waver: a quarter is left for that."""
    matrix = torch.randn(384, 384)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    peak_flops.cache_clear()
    peak = peak_flops(torch.device("cpu"), "fp32")
    assert sorted(seconds)[2] * peak.flops_per_s > 0.75 * 2 * 384**3
