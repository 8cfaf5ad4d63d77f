import json
import random
import shutil
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import vlm
from vlm.checkpoint import list_checkpoints, load_newest, verify
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.runtime.device import machine


def weights(run):
    return {name: (run / "model" / name).read_bytes() for name in ("model.safetensors",)}


def kill_at(process, run, step):
    """SIGKILL as soon as `step` stands in the metrics."""
    deadline = time.monotonic() + 60
    path = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.alive():
        if path.exists() and path.read_text().count("\n") >= step:
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == [-signal.SIGKILL]


def test_a_run_says_when_it_started_and_on_what(finished_run):
    command = json.loads((finished_run / "command.json").read_text())
    assert command["machine"].split(",")[0] == machine(torch.device("cpu")).split(",")[0]
    started = datetime.fromisoformat(command["started"])
    assert started.tzinfo == UTC
    assert started < datetime.now(UTC)


def test_a_killed_run_resumes_to_the_same_bits(start, finished_run, metrics, tmp_path):
    run = tmp_path / "killed"
    for step in sorted(random.sample(range(5, 28), 2)):  # killed twice, at random steps
        kill_at(start(f"run.dir={run}", "--resume", "auto"), run, step)
        assert load_newest(run / "checkpoints") is not None
    out = start(f"run.dir={run}", "--resume", "auto").finish()
    assert f"resuming {run} at step " in out
    assert weights(run) == weights(finished_run)
    newest = [load_newest(r / "checkpoints") for r in (run, finished_run)]
    for group in ("model", "optimizer", "ema"):
        for name, tensor in newest[0].groups[group].items():
            assert tensor.equal(newest[1].groups[group][name]), (group, name)
    assert [line["step"] for line in metrics(run)] == list(range(1, 31))
    ours, theirs = ([line["loss"] for line in metrics(r)] for r in (run, finished_run))
    assert ours == theirs


def test_a_damaged_newest_checkpoint_is_passed_over(start, finished_run, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "model")
    older, newest = list_checkpoints(run / "checkpoints")
    (newest / "optimizer.safetensors").write_bytes(b"damage")
    out = start(f"run.dir={run}", "--resume", "auto").finish()
    assert f"at step {int(older.name[5:])} of 30" in out
    assert weights(run) == weights(finished_run)
    assert verify(newest) is None


def test_a_finished_run_is_not_overwritten(start, finished_run):
    before = weights(finished_run)
    refused = start(f"run.dir={finished_run}")
    assert refused.wait() == [2]
    assert refused.said() == [
        f"error: {finished_run} holds a run already; continue it with --resume auto, "
        "or start another with run.dir=FOLDER"
    ]
    assert weights(finished_run) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train.seed": 1}, ConfigError, "train.seed was 0, is 1; samples would repeat or be lost"),
        ({"train.global_batch_size": 8}, ConfigError, "train.global_batch_size was 16, is 8; "),
        ({"data.train": "val_concept-*.tar"}, DataError, "was made with another data set"),
        ({"model.embed_dim": 8}, CheckpointError, "was saved by another model: "),
    ],
)
def test_resuming_something_else_is_refused(config, finished_run, change, error, message):
    if "data.train" in change:
        emoji = Path(__file__).parents[2] / "datasets/emoji"
        change = {"data.train": str(emoji / change["data.train"])}
    with pytest.raises(error, match=message) as raised:
        vlm.train(config, {"run.dir": str(finished_run), **change}, resume="auto")
    assert len(raised.value.problems) == 1


def test_a_finished_run_goes_on_when_it_gets_more_steps(start, finished_run, tmp_path):
    run = tmp_path / "longer"
    shutil.copytree(finished_run, run)
    out = start(f"run.dir={run}", "--resume", "auto", "train.steps=34").finish()
    assert "\ntrain.steps was 30, is 34 from here on\n" in out
    assert f"{run / 'model'} is model-00000030 now, for the run goes on\n" in out
    before = (run / "model-00000030" / "model.safetensors").read_bytes()
    assert before == weights(finished_run)["model.safetensors"]
    assert weights(run) != weights(finished_run)
    made_by = [
        (run / name).read_bytes() for name in ("config.yaml", "command.json", "metrics.jsonl")
    ]
    words = ("--resume", "auto", "train.steps=34", "optim.lr=1")
    assert "nothing is left to train" in start(f"run.dir={run}", *words).finish()
    assert made_by == [
        (run / name).read_bytes() for name in ("config.yaml", "command.json", "metrics.jsonl")
    ]
