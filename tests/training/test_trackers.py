"""TensorBoard and Weights & Biases copy metrics.jsonl, each step once, and they end no run."""

import gc
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

import vlm
from vlm.checkpoint import list_checkpoints
from vlm.cli.main import main
from vlm.config.load import load_config
from vlm.data.tally import Tally
from vlm.training.run_log import RunLog
from vlm.training.step import StepResult
from vlm.training.trackers import Trackers
from vlm.training.wandb_tracker import _records

RUN = {
    "run.trackers": ["tensorboard", "wandb"],
    "train.steps": 12,
    "train.global_batch_size": 4,
    "train.ema_decay": 0,
}
SAME_EACH_TIME = ("loss", "loss/contrastive", "loss/caption", "lr", "grad_norm", "logit_scale")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """As on a machine where nobody has used wandb; afterwards its process is gone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield
    wandb.teardown()


@pytest.fixture
def train(config, tmp_path, capsys):
    """Train here to the end of 12 steps; the lines that were printed."""

    def train(**settings):
        resume = "auto" if (tmp_path / "run").exists() else "never"
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        vlm.train(config, {**RUN, "run.dir": tmp_path / "run", **settings}, resume=resume)
        wandb.teardown()  # as the end of a process does
        return capsys.readouterr().out.splitlines()

    return train


@pytest.fixture
def follow(config, tmp_path, capsys):
    """Give trackers the lines of steps as a run does, with a fault after two; what was said."""

    def follow(names, *, steps=range(6), results=(), fault=lambda trackers: None):
        words = [f"run.trackers=[{names}]", f"run.dir={tmp_path}/run"]
        trackers = Trackers(load_config(config, words), is_main=True)
        path = tmp_path / "run/metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        log = RunLog(
            path,
            num_steps=6,
            global_batch_size=16,
            every_steps=1,
            start_step=steps.start,
            trackers=trackers,
        )
        for step in steps:
            if step == 2:
                fault(trackers)
            result = StepResult({"loss": 1.0}, 1.0, False, 1e-3, 14.0, 16, 0, 99, 0.1, Tally())
            counters = {"bad_samples": 2, "skipped_steps": 0, "bad_by_reason": {"text.missing": 2}}
            log.write(step, result, data_wait_s=0.0, counters=counters)
        log.close()
        trackers.finish(6, results)
        trackers.close()
        wandb.teardown()  # as the end of a process does
        return capsys.readouterr().out.splitlines()

    return follow


def curves(lines):
    """All numbers of a log: the (step, value) pairs of each name."""
    found = defaultdict(list)
    for line in lines:
        for key, value in line.items():
            parts = value if isinstance(value, dict) else {None: value}
            for part, number in parts.items():
                if key != "step" and number is not None:
                    name = key if part is None else f"{key}/{part}"
                    found[name].append((line["step"], number))
    return dict(found)


def tensorboard_of(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    return events.Reload()


def shown_by_tensorboard(run):
    events = tensorboard_of(run)
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def records(run):
    """Of all that wandb wrote, in the order in which `wandb sync` uploads it."""
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        yield from map(Record.FromString, _records(path.read_bytes()))


def shown_by_wandb(run):
    lines = []
    for record in records(run):
        if record.HasField("history"):
            items = {"/".join(item.nested_key): item.value_json for item in record.history.item}
            line = {name: json.loads(value) for name, value in items.items() if name[0] != "_"}
            lines.append({"step": record.history.step.num, **line})
    return curves(lines)


def assert_equal(shown, lines, *, but_times=False):
    """The same steps, each once and in order, and the same values."""
    log = curves(lines)
    assert {name for name in shown if not name.startswith("eval/")} == set(log)
    for name, points in log.items():
        assert [step for step, _ in shown[name]] == [step for step, _ in points], name
        if name in SAME_EACH_TIME or not but_times:
            values = [value for _, value in shown[name]]  # TensorBoard's have single precision
            assert values == pytest.approx([value for _, value in points], rel=1e-6), name


def go_back(run, step):
    """To the checkpoint of a step, as if the run had been killed before the next."""
    shutil.rmtree(run / "model")
    for path in list_checkpoints(run / "checkpoints"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def test_each_step_once_also_after_going_back_to_a_checkpoint(train, shards, metrics, tmp_path):
    run = tmp_path / "run"
    said = train()
    assert f"wandb: offline; to upload: wandb sync {run / 'wandb'}" in said
    assert not [line for line in said if "warning" in line]
    assert_equal(shown_by_tensorboard(run), metrics(run))
    assert_equal(shown_by_wandb(run), metrics(run))
    go_back(run, 8)
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"tasks: [{{task: retrieval, data: {shards}, split: val}}]")
    train(eval__suite=suite)
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))
    assert_equal(shown_by_tensorboard(run), metrics(run))
    assert_equal(shown_by_wandb(run), metrics(run), but_times=True)
    assert_results(run, json.loads((run / "results.json").read_text()), step=12)
    assert_settings(run)
    assert_nothing_about_the_machine(run)


def test_results_stand_once_however_often_a_run_is_measured(follow, metrics, tmp_path):
    run = tmp_path / "run"
    row = {"task": "retrieval", "split": "val", "metric": "recall@1", "ci95": [0.1, 0.3], "n": 9}
    for value, steps in ((0.1, range(6)), (0.2, range(6, 6))):
        results = [{**row, "value": value, "chance": 0.01, "protocol": "abc"}]
        follow("tensorboard, wandb", steps=steps, results=results)
    assert_equal(shown_by_tensorboard(run), metrics(run))
    assert_equal(shown_by_wandb(run), metrics(run))
    assert_results(run, results, step=6)


def assert_results(run, results, *, step):
    expected = {
        f"eval/{r['task']}-{r['split']}/{r['metric']}{key}": value
        for r in results
        for key, value in (
            ("", r["value"]),
            *((f"/{key}", r[key]) for key in ("n", "chance")),
            *zip(("/ci95_low", "/ci95_high"), r["ci95"], strict=True),
        )
    }
    shown = {tag: points for tag, points in shown_by_tensorboard(run).items() if "eval/" in tag}
    assert {tag: [at for at, _ in points] for tag, points in shown.items()} == {
        tag: [step] for tag in expected
    }
    values = {tag: points[0][1] for tag, points in shown.items()}
    assert values == pytest.approx(expected, rel=1e-6)
    summary = {}
    for record in records(run):
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert expected.items() <= summary.items()


def assert_settings(run):
    runs = [record.run for record in records(run) if record.HasField("run")]
    for wandb_run in runs:
        identity = (wandb_run.run_id, wandb_run.project, wandb_run.display_name, wandb_run.resume)
        assert identity == ((run / "wandb/run-id").read_text(), "vlm", "run", True)
    assert len(runs) == 2
    settings = {item.key: json.loads(item.value_json) for item in runs[-1].config.update}
    assert settings["optim"]["lr"] == 1e-3
    events = tensorboard_of(run)
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("_hparams_")]
    content = events.SummaryMetadata(tag).plugin_data.content
    hyper_parameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyper_parameters["optim.lr"].number_value == 1e-3
    assert hyper_parameters["model.text.tokenizer"].string_value == "bpe:400"


def assert_nothing_about_the_machine(run):
    assert not any(record.run.HasField("git") or record.run.host for record in records(run))
    for path in run.glob("wandb/offline-run-*/*.wandb"):
        data = path.read_bytes()
        for secret in (socket.gethostname(), sys.executable, platform.release()):
            is_telling = len(secret) > 4  # shorter ones are found in compressed data by chance
            assert not is_telling or secret.encode() not in data, secret
        assert not list((path.parent / "files").iterdir())
    assert not any(socket.gethostname() in path.name for path in run.rglob("*tfevents*"))


def test_a_killed_run_loses_no_step(start, train, metrics, tmp_path):
    run, num_steps = tmp_path / "run", 60
    settings = {**RUN, "train.steps": num_steps, "run.dir": run}
    process = start(*(f"{name}={value}" for name, value in settings.items()))
    wait_until(lambda: list_checkpoints(run / "checkpoints"))
    begun = children(process.processes[0].pid)
    process.kill()
    for pid in begun.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert 4 <= len(metrics(run)) < num_steps
    train(train__steps=num_steps)
    assert [line["step"] for line in metrics(run)] == list(range(1, num_steps + 1))
    assert_equal(shown_by_tensorboard(run), metrics(run))
    assert_equal(shown_by_wandb(run), metrics(run), but_times=True)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


def children(pid):
    """Processes started by any thread of a process, by name."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found[Path(f"/proc/{child}/comm").read_text().strip()] = int(child)
    return found


def test_wandbs_process_that_dies_is_one_warning(follow, metrics, tmp_path):
    def kill(_trackers):
        pid = children(os.getpid())["wandb-core"]
        popens = [popen for popen in gc.get_objects() if type(popen) is subprocess.Popen]
        (popen,) = [popen for popen in popens if popen.pid == pid]
        popen.kill()
        popen.wait()  # wandb does not, and a Popen that nobody waits for is a warning

    said = follow("tensorboard, wandb", fault=kill)
    (warning,) = [line for line in said if "warning" in line]
    assert warning.startswith("warning: wandb: ")
    assert_equal(shown_by_tensorboard(tmp_path / "run"), metrics(tmp_path / "run"))


@pytest.mark.long
def test_a_run_outlives_wandbs_own_process(start, metrics, tmp_path):
    run = tmp_path / "run"
    process = start("run.trackers=[wandb]", f"run.dir={run}", "train.steps=60")
    wait_until(lambda: (run / "metrics.jsonl").exists() and metrics(run))
    os.kill(children(process.processes[0].pid)["wandb-core"], signal.SIGKILL)
    assert process.finish().count("warning: wandb: ") == 1
    assert len(metrics(run)) == 60
    assert (run / "model").exists()


def test_a_tracker_that_comes_later_gets_the_whole_log(follow, metrics, tmp_path):
    run = tmp_path / "run"
    follow("", steps=range(4))
    follow("tensorboard, wandb", steps=range(4, 6))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert_equal(shown_by_tensorboard(run), metrics(run))
    assert_equal(shown_by_wandb(run), metrics(run))


def test_a_tracker_that_fails_is_dropped_with_one_warning(follow, metrics, tmp_path):
    run = tmp_path / "run"
    said = follow(
        "tensorboard, wandb",
        fault=lambda trackers: trackers._open["tensorboard"]._file.close(),
    )
    assert [line for line in said if "warning" in line] == [
        "warning: tensorboard: write to closed file; it is dropped, and the run goes on"
    ]
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert_equal(shown_by_tensorboard(run), metrics(run)[:2])
    assert_equal(shown_by_wandb(run), metrics(run))


def test_a_full_disk_is_one_warning(follow):
    def fill(trackers):
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), trackers._open["tensorboard"]._file.fileno())

    said = follow("tensorboard", fault=fill)
    assert [line for line in said if "warning" in line] == [
        "warning: tensorboard: [Errno 28] No space left on device; it is dropped, "
        "and the run goes on"
    ]


def test_a_tracker_that_cannot_start_is_dropped_with_one_warning(follow, metrics, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("in the way")
    (warning,) = [line for line in follow("tensorboard") if "warning" in line]
    assert warning.startswith("warning: tensorboard: [Errno 17] File exists: ")
    assert len(metrics(tmp_path / "run")) == 6


def test_wandb_without_a_login_is_dropped_and_disabled_writes_nothing(
    follow, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "online")
    (warning,) = [line for line in follow("wandb") if "warning" in line]
    assert warning.startswith("warning: wandb: ")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not [line for line in follow("wandb") if "wandb" in line]
    assert not list(tmp_path.glob("run/wandb/*run-*/*.wandb"))


def refusal(config, run, capsys):
    assert main(["train", str(config), "run.trackers=[tensorboard, wandb]", f"run.dir={run}"]) == 2
    assert not run.exists()
    return capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_told_first(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert refusal(config, tmp_path / "run", capsys) == (
        "error: run.trackers: not installed: wandb; pip install 'vlm[track]', "
        "or take it out of run.trackers\n"
    )


def test_a_folder_called_wandb_is_not_the_package(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name in ("tensorboard", "wandb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "not installed: tensorboard, wandb; " in refusal(config, tmp_path / "run", capsys)


def test_other_ranks_track_nothing(config, tmp_path):
    settings = load_config(config, ["run.trackers=[tensorboard]", f"run.dir={tmp_path}/run"])
    trackers = Trackers(settings, is_main=False)
    trackers.start([{"step": 1, "loss": 1.0}], print)
    trackers.finish(1, [])
    trackers.close()
    assert not (tmp_path / "run").exists()
