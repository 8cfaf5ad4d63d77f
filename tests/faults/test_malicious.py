"""Nothing that is read runs: malicious artefacts under an audit hook, which a decoder trips."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("malicious.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malicious")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(report):
    return report["results"]


def test_no_artefact_runs_code_starts_a_process_connects_or_writes(results):
    assert len(results) > 150
    assert {name: found for name, found in results.items() if found["events"]} == {}
    assert not any(found["marker"] for found in results.values())


def test_every_refusal_is_one_of_our_errors(results):
    escaped = {n: r["outcome"] for n, r in results.items() if r["outcome"].startswith("ESCAPED")}
    assert escaped == {}


def test_the_stock_decoder_trips_the_hook(report):
    for name, found in report["control"].items():
        assert any(event.startswith("pickle.find_class") for event in found["events"]), name
        assert found["marker"], name


def test_payloads_beside_a_sample_are_never_read(results):
    beside = [r["outcome"] for n, r in results.items() if n.startswith("shard ") and "," not in n]
    assert beside == ["1 samples, 1 read, 1 valid, 0 rejects"] * 36


@pytest.mark.parametrize("kind", ["spec ", "config, ", "suite, ", "override "])
def test_what_is_not_data_is_refused(results, kind):
    outcomes = {n: r["outcome"] for n, r in results.items() if n.startswith(kind)}
    assert outcomes
    assert {n: o for n, o in outcomes.items() if "Error: " not in o} == {}


def test_what_is_no_safetensors_file_is_refused(results):
    accepted = {
        n for n, r in results.items() if n.startswith("model, ") and r["outcome"] == "loaded"
    }
    assert accepted == set()
