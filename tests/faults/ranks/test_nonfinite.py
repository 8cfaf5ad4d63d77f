"""E1, E2: a step that is not finite on one rank is skipped on all; a jump of the loss is told."""

import json
from pathlib import Path

import pytest

from vlm.training.guards import SpikeGuard

SPOILED = ["nan loss", "inf loss", "nan gradient", "inf gradient", "nan pixels"]
CLEAN = Path(__file__).with_name("clean_losses.json")  # of 20 seeds, by record_losses.py


def weights(run, step):
    return (run / f"checkpoints/step-{step:08}/model.safetensors").read_bytes()


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_what_one_rank_has_is_skipped_on_both(start, run, metrics, record, rank):
    places = [(name, 4 + 2 * n, rank) for n, name in enumerate(SPOILED)]
    ranks = start("run.save_every_steps=1", "run.keep_checkpoints=30", faults=places[:3])
    assert ranks.wait() == [0, 0]
    for name, step, _ in places[:3]:
        assert weights(run, step - 1) == weights(run, step), name
        assert weights(run, step) != weights(run, step + 1), name
    assert [line["skipped_steps"] for line in metrics()] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    state = json.loads((run / "checkpoints/step-00000012/state.json").read_text())
    assert state["guards"]["finite"]["recent"] == [4, 6, 8]
    # the quota is part of the state: the fourth in a hundred comes after a restart
    resumed = start("train.steps=20", "--resume", "auto", faults=[(SPOILED[3], 14, rank)])
    assert resumed.wait() == [7, 7]
    assert len(resumed.errors()) == 1
    (line,) = resumed.errors().values()
    assert "4 of the last 100 steps had a loss or gradient that is not finite" in line
    assert "the last at step 14" in line
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000012"
    outcome = "skipped on both ranks, weights unchanged; the fourth, after a restart: exit 7"
    record("E1", f"{', '.join(SPOILED[:4])} of rank {rank}", 4, outcome)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", SPOILED)
def test_more_than_three_of_them_end_the_run(start, run, metrics, record, name, rank):
    ranks = start(faults=[(name, step, rank) for step in (5, 6, 7, 8)])
    assert ranks.wait() == [7, 7]
    assert len(ranks.errors()) == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004"]
    assert metrics()[-1]["skipped_steps"] == 3
    record("E1", f"{name} of rank {rank} in 4 steps", 1, "exit 7, the checkpoint before it stays")


def test_no_false_alarm_in_clean_runs(record):
    losses = json.loads(CLEAN.read_text())
    assert len(losses) == 20
    warnings = []
    for seed, run in enumerate(losses):
        guard = SpikeGuard()
        for step, loss in enumerate(run, start=1):
            warnings += [(seed, line) for line in guard.check(step, loss)]
    assert warnings == []
    record("E2", f"20 clean seeds of {len(losses[0])} steps", 20, "no warning")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_a_hundredfold_learning_rate_is_told_within_two_steps(start, record, seed):
    words = ("train.steps=1000", f"train.seed={seed}", "run.save_every_steps=0")
    ranks = start(*words, faults=[("hundredfold lr", 150, 0), ("terminate", 152, 0)], world_size=1)
    assert ranks.wait() == [75]
    warnings = [line for line in ranks.said(0) if line.startswith("warning: loss ")]
    assert len(warnings) == 1
    step = int(warnings[0].split(" at step ")[1].split()[0])
    assert step in (151, 152)
    assert "sigma above its running mean" in warnings[0]
    record("E2", "learning rate x 100 at step 150", 1, f"warning at step {step}")


def test_a_new_level_is_told_once_and_then_normal():
    guard = SpikeGuard()
    losses = [2.0 + 0.1 * (step % 3) for step in range(100)]
    told = [
        guard.check(step, loss) for step, loss in enumerate([*losses, *(9 + x for x in losses)])
    ]
    assert [step for step, lines in enumerate(told) if lines] == [100]
    assert guard.mean > 10
