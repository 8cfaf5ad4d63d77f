"""The order of 407 million samples in 41,455 shards: any position at once, in little memory.

Measured in a process of its own, since memory is a process's.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, time
from pathlib import Path
import numpy as np
from vlm.data.order import SampleOrder
sizes = np.random.default_rng(0).integers(9_000, 10_636, size=41_455).tolist()
def restore(step, streams):
    started = time.perf_counter()
    order = SampleOrder(sizes, seed=0, streams=streams, global_batch_size=32768)
    order.batch(step, rank=3, world_size=8)
    return time.perf_counter() - started
restore(0, 1)
times = [restore(step, streams) for step in (1, 12_345, 10**6) for streams in (1, 8, 64)]
# not ru_maxrss: a process begins with that of the one that started it
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"samples": sum(sizes), "seconds": sorted(times), "peak_mib": peak}))
"""


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    return json.loads(done.stdout)


def test_a_position_among_407_million_samples_is_found_in_200_ms(measured):
    assert 406e6 < measured["samples"] < 408e6
    assert measured["seconds"][len(measured["seconds"]) // 2] < 0.2


def test_it_takes_less_than_200_mb(measured):
    assert measured["peak_mib"] * 1.048576 < 200
