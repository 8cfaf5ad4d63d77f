"""When and how a run's state is saved: in a thread, best kept, failures survived and counted."""

import json
import threading

import pytest
import torch

from vlm import checkpoint
from vlm.config.load import load_config
from vlm.data.tally import Tally
from vlm.errors import ConfigError, DiskError, NonFiniteError, Preempted
from vlm.runtime import distributed
from vlm.runtime.distributed import Ranks
from vlm.training.run_log import RunLog
from vlm.training.saving import Saver
from vlm.training.setup import build_parts
from vlm.training.step import StepResult

BAD = {"bad": {}}


@pytest.fixture
def make(config, tmp_path):
    """Parts of a run that has done two steps, and a saver for them."""

    def make(*overrides, name="checkpoints"):
        settings = load_config(config, overrides)
        parts = build_parts(settings, Ranks())
        batches = parts.batches(0, Ranks())
        for step in range(2):
            parts.step(step, next(batches))
        saver = Saver(tmp_path / name, settings)
        saver.log = RunLog(
            tmp_path / "metrics.jsonl", num_steps=30, global_batch_size=16, every_steps=1
        )
        return parts, saver

    return make


def log_loss(saver, step, loss, **measured):
    result = StepResult({"loss": loss}, 1.0, False, 1e-3, 14.0, 16, 0, 0, 0.1, Tally())
    counters = {"bad_samples": 0, "skipped_steps": 0}
    saver.log.write(step, result, data_wait_s=0.0, counters=counters, measured=measured)


def files(folder):
    (path,) = checkpoint.list_checkpoints(folder)
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_saved_in_the_thread_is_the_state_at_the_call(make, tmp_path):
    parts, sync = make("run.async_save=false", name="sync")
    _, late = make("run.async_save=true", name="late")
    release = threading.Event()
    with sync, late:
        sync.save(2, parts, BAD)
        late._thread.submit(release.wait)  # the thread comes to the save only when it is too late
        late.save(2, parts, BAD)
        for tensor in parts.step.module.parameters():
            tensor.data.zero_()
        for optimizer in parts.step.optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        for tensor in parts.step.averaged.shadow.values():
            tensor.zero_()
        release.set()
    assert files(tmp_path / "late") == files(tmp_path / "sync")


@pytest.mark.parametrize(("minutes", "on_the_way"), [("0.0005", True), ("0", False)])
def test_two_ranks_save_by_the_clock_of_the_first(start, tmp_path, minutes, on_the_way):
    when = ("run.save_every_steps=0", f"run.save_every_minutes={minutes}")
    start("train.steps=9", *when, f"run.dir={tmp_path}", world_size=2).finish()
    saved = [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")]
    assert saved[-1] == "step-00000009"
    assert (len(saved) > 1) == on_the_way


def test_the_first_rank_alone_keeps_a_clock(make, monkeypatch):
    _, saver = make("run.save_every_minutes=1")
    assert not saver.is_late
    saver.last_save -= 61
    assert saver.is_late
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert not saver.is_late


@pytest.mark.parametrize("mode", ["true", "false"])
def test_failed_saves_are_warned_of_and_the_third_in_a_row_ends_the_run(
    make, tmp_path, capsys, mode
):
    parts, saver = make(f"run.async_save={mode}", "run.save_every_steps=1")
    in_the_way = tmp_path / "checkpoints"
    in_the_way.write_text("no folder")

    def steps(first, last):
        for done in range(first, last + 1):
            assert saver.due(done, asked=False)
            saver.save(done, parts, BAD)
        saver._thread.submit(bool).result()  # all before it is through

    def run():
        steps(1, 2)
        in_the_way.unlink()
        steps(3, 3)
        assert saver.due(4, asked=False)
        assert [p.name for p in in_the_way.iterdir()] == ["step-00000003"]
        in_the_way.rename(tmp_path / "good")
        in_the_way.write_text("no folder")
        steps(5, 9)

    with pytest.raises(DiskError, match="cannot save: File exists"), saver:
        run()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert [line[-16:] for line in warnings] == ["(failure 1 of 3)", "(failure 2 of 3)"] * 2
    assert "older checkpoints are intact" in warnings[0]


@pytest.mark.parametrize("mode", ["true", "false"])
@pytest.mark.parametrize("ending", [None, Preempted("saved"), NonFiniteError("graver")])
def test_a_failed_last_save_is_an_error_at_once(make, tmp_path, mode, ending):
    parts, saver = make(f"run.async_save={mode}")
    (tmp_path / "checkpoints").write_text("no folder")

    def end():
        with saver:
            saver.save(30, parts, BAD)
            if ending is not None:
                raise ending

    with pytest.raises(NonFiniteError if isinstance(ending, NonFiniteError) else DiskError):
        end()


def test_the_best_by_the_log_is_kept_beside_the_newest(make, tmp_path):
    parts, saver = make("run.keep_best=min:loss")
    with saver:
        for step, loss in enumerate([5.0, 2.0, float("nan"), 3.0, 4.0], start=1):
            log_loss(saver, step - 1, loss)
            saver.save(step, parts, BAD)
    folder = tmp_path / "checkpoints"
    assert [p.name[-1] for p in checkpoint.list_checkpoints(folder)] == ["2", "4", "5"]
    assert checkpoint.best(folder, "min:loss").name == "step-00000002"
    assert checkpoint.best(folder, "max:loss") is None
    state = json.loads((folder / "step-00000002/state.json").read_text())
    assert state["metric"] == {"rule": "min:loss", "value": 2.0}


def test_a_metric_that_the_log_does_not_have_is_refused(make):
    parts, saver = make("run.keep_best=max:acc1")
    log_loss(saver, 0, 1.0)
    with pytest.raises(ConfigError, match="the log has no acc1; it has step, time_s, loss"), saver:
        saver.save(1, parts, BAD)


METRIC = "eval/zero_shot-val/acc1"


def test_the_best_by_the_suite_is_saved_when_it_is_measured(make, tmp_path):
    words = ("eval.suite=emoji_demo", "eval.every_steps=2", "run.save_every_steps=0")
    parts, saver = make(f"run.keep_best=max:{METRIC}", *words, "run.save_every_minutes=0")
    with saver:
        for done, score in enumerate([None, 0.9, None, 0.5, None, None, None], start=1):
            log_loss(saver, done - 1, 1.0, **({} if score is None else {METRIC: score}))
            assert saver.due(done, asked=False) == (done % 2 == 0)
            if done % 2 == 0 or done == 7:  # also what could not be measured, and the last
                saver.save(done, parts, BAD)
    folder = tmp_path / "checkpoints"
    assert [p.name[-1] for p in checkpoint.list_checkpoints(folder)] == ["2", "6", "7"]
    assert checkpoint.best(folder, f"max:{METRIC}").name == "step-00000002"


def test_a_metric_that_the_suite_does_not_have_is_refused(make):
    words = ("eval.suite=emoji_demo", "eval.every_steps=2")
    parts, saver = make("run.keep_best=max:eval/zero_shot-val/acc", *words)
    log_loss(saver, 0, 1.0, **{METRIC: 0.5})
    with pytest.raises(ConfigError, match="the log has no eval/zero_shot-val/acc; it has"), saver:
        saver.save(1, parts, BAD)


def test_a_full_disk_keeps_the_log_whole(make, tmp_path, capsys):
    _, saver = make()
    log_loss(saver, 0, 1.0)
    path = tmp_path / "metrics.jsonl"
    path.rename(tmp_path / "aside")
    path.mkdir()  # nothing can be appended to it
    for step in (1, 2):
        log_loss(saver, step, 1.0)
    path.rmdir()
    (tmp_path / "aside").rename(path)
    log_loss(saver, 3, 1.0)
    saver.log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("its lines wait in memory") == 1


def test_lines_that_could_not_be_written_end_the_run(make, tmp_path):
    _, saver = make()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    log_loss(saver, 0, 1.0)
    with pytest.raises(DiskError, match="cannot write its last lines"):
        saver.log.close()


def test_equal_values_keep_the_newer(tmp_path):
    for step in (1, 2, 3, 4):
        state = {"metric": {"rule": "max:acc", "value": 0.5 if step < 3 else 0.1}}
        checkpoint.save(
            tmp_path, step, {"model": {"w": torch.zeros(1)}}, state, keep=2, keep_best="max:acc"
        )
    assert [p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["2", "3", "4"]
