"""A reading worker does not leak: the short form of benchmarks/loader_memory.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_worker_keeps_less_than_500_bytes_a_sample(tmp_path):
    out = tmp_path / "memory.json"
    command = ["benchmarks/loader_memory.py", "--samples=5000", f"--out={out}"]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    assert json.loads(out.read_text())["bytes_per_sample"] < 500
