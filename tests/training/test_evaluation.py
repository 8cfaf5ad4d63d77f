"""`eval.every_steps`: a run is measured on its way, and goes on as if it had not been."""

import json
import sys

import pytest

from vlm.eval.suite import evaluate
from vlm.hub.load import load
from vlm.report.page import write_report

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TIMES = ("time_s", "samples_per_s", "data_wait", "eta_s", "mfu", "peak_memory_gib", "flops_per_s")
SHORT = ("train.steps=9", "optim.name=adamw", "optim.warmup_steps=2", "run.log_every_steps=2")


@pytest.fixture
def suite(shards, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"tasks: [{{task: zero_shot, split: val, data: {shards}, templates: none}}, "
        f"{{task: caption, split: val, data: {shards}}}]"
    )
    return path


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def untimed(lines):
    kept = [name for name in lines[0] if name not in TIMES]
    return {line["step"]: {name: line[name] for name in kept} for line in lines}


def test_it_changes_nothing_but_what_is_measured(start, metrics, suite, tmp_path):
    finish(start(*SHORT, f"run.dir={tmp_path}/plain"))
    words = (f"run.dir={tmp_path}/run", f"eval.suite={suite}", "eval.every_steps=3")
    said = finish(start(*SHORT, *words))
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


def test_the_last_results_are_those_of_the_model_that_is_saved(start, suite, tmp_path):
    finish(start(*SHORT, f"run.dir={tmp_path}/run", f"eval.suite={suite}"))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert evaluate(load(tmp_path / "run"), suite, log=lambda line: None) == results


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_measure_as_one_does(start, metrics, suite, tmp_path, strategy):
    """Weights of the moment are those of a run that ends there."""
    words = (*SHORT, "optim.schedule=constant", f"eval.suite={suite}")
    more = ("eval.every_steps=6", f"train.strategy={strategy}", f"run.dir={tmp_path}/run")
    finish(start(*words, *more, launcher=(*TORCHRUN, "-m", "vlm")))
    rows = json.loads((tmp_path / "run/evals/step-00000006.json").read_text())
    until = ("train.steps=6", f"train.strategy={strategy}", f"run.dir={tmp_path}/short")
    finish(start(*words, *until, launcher=(*TORCHRUN, "-m", "vlm")))
    assert rows == json.loads((tmp_path / "short/results.json").read_text())
    assert rows == evaluate(load(tmp_path / "short"), suite, log=lambda line: None)
