"""`eval.every_steps`: a run is measured on its way, and goes on as if it had not been."""

import json
import shutil
from pathlib import Path

import pytest

from vlm.checkpoint import list_checkpoints, load_newest
from vlm.config.load import load_config
from vlm.errors import DataError
from vlm.eval.suite import evaluate
from vlm.hub.load import load
from vlm.report.page import write_report
from vlm.runtime.distributed import Ranks
from vlm.training import evaluation, loop
from vlm.training.plan import print_plan

TIMES = ("time_s", "samples_per_s", "data_wait", "eta_s", "mfu", "peak_memory_gib", "flops_per_s")
SHORT = ("train.steps=9", "optim.name=adamw", "optim.warmup_steps=2", "run.log_every_steps=2")


EMOJI = Path(__file__).parents[2] / "datasets/emoji"


@pytest.fixture
def suite(shards, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"tasks: [{{task: zero_shot, split: val, data: {shards}, templates: none}}, "
        f"{{task: caption, split: val, data: {shards}}}, "
        f"{{task: retrieval, split: emoji, data: '{EMOJI}/val_concept-*.tar'}}]"
    )
    return path


@pytest.fixture
def train(vlm_on, config):
    """Trains to the end, on so many ranks; what was said."""

    def train(world_size, *words):
        return vlm_on(world_size, "train", config, *SHORT, *words).finish()

    return train


def untimed(lines):
    kept = [name for name in lines[0] if name not in TIMES]
    return {line["step"]: {name: line[name] for name in kept} for line in lines}


def test_it_changes_nothing_but_what_is_measured(train, metrics, suite, tmp_path):
    train(1, f"run.dir={tmp_path}/plain")
    words = (f"run.dir={tmp_path}/run", f"eval.suite={suite}", "eval.every_steps=3")
    said = train(1, *words)
    run, plain = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    assert untimed(run).items() >= untimed(plain).items()
    measured = {line["step"]: line for line in run if "eval/zero_shot-val/acc1" in line}
    assert list(measured) == [3, 6]
    for step, line in measured.items():
        rows = json.loads((tmp_path / f"run/evals/step-{step:08}.json").read_text())
        numbers = {f"eval/{r['task']}-{r['split']}/{r['metric']}": r["value"] for r in rows}
        assert numbers.items() <= line.items()
        assert f"step {step}: zero_shot-val acc1 {rows[0]['value']:.4f}  caption-val" in said
    assert "zero_shot-val: acc1 in %" in write_report(tmp_path / "run").read_text()


def test_a_run_outlives_what_cannot_be_measured(config, suite, tmp_path, monkeypatch, capsys):
    def fails(model, path, *, out, log):  # data that is lost while a run goes on
        if out is None:
            raise DataError("val: a shard is gone")
        return []

    monkeypatch.setattr(evaluation, "evaluate", fails)
    words = [*SHORT, f"run.dir={tmp_path}/run", f"eval.suite={suite}", "eval.every_steps=4"]
    assert loop.train(config, words).results == []
    said = capsys.readouterr().out
    assert "warning: step 8 is not measured: val: a shard is gone" in said


def test_a_suite_of_what_is_not_there_stops_no_run_on_its_way(config, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("tasks: [{task: caption, split: val, data: nowhere-*.tar}]")
    for run in (loop.train, lambda *words: print_plan(load_config(*words), Ranks())):
        with pytest.raises(DataError, match=r"caption-val: .*nowhere"):
            run(config, [*SHORT, f"run.dir={tmp_path}/run", f"eval.suite={path}"])


def test_the_last_results_are_those_of_the_model_that_is_saved(train, suite, tmp_path):
    train(1, f"run.dir={tmp_path}/run", f"eval.suite={suite}")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert evaluate(load(tmp_path / "run"), suite, log=lambda line: None) == results


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_measure_the_averaged_weights_of_the_moment(train, suite, tmp_path, strategy):
    """Those that the checkpoint of the same step has."""
    run = tmp_path / "run"
    words = (f"eval.suite={suite}", "eval.every_steps=4", f"train.strategy={strategy}")
    train(2, *words, f"run.dir={run}")
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    checkpoint = load_newest(run / "checkpoints")
    assert checkpoint.state["step"] == 8
    model = load(run)
    model.model.load_state_dict({**checkpoint.groups["model"], **checkpoint.groups["ema"]})
    rows = json.loads((run / "evals/step-00000008.json").read_text())
    assert rows == evaluate(model, suite, log=lambda line: None)
