"""docs/scaling.md tells what the benchmark's result says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/scaling.json"


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs/scaling.md").read_text()


def test_the_table_is_the_benchmarks(page):
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--table", "--out", str(RESULT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in page


def test_the_figures_in_the_text_are_the_results(page):
    result, text = json.loads(RESULT.read_text()), " ".join(page.split())
    for name in ("samples", "shards", "ranks", "nodes", "global_batch_size", "steps_per_epoch"):
        assert f"{result[name]:,}" in text, name
    for phrase in (
        f"a shard {result['shard_bytes'] / 1e6:,.0f} MB",
        f"all of it {result['data_tb']:,.0f} TB",
        f"{result['index_bytes_per_sample']} bytes with keys of 9 letters",
        f"{result['index_tb']:.2f} TB in all",
        f"{result['index_tb'] / result['data_tb']:.2%} of the data",
        f"{result['read_mb_per_node_and_step']:.1f} MB, whatever the streams",
    ):
        assert phrase in text, phrase
