"""The memory plan: predicted, fitted into a budget, and compared with what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlm.config.load import load_config
from vlm.errors import ConfigError
from vlm.runtime.distributed import Ranks
from vlm.training import setup
from vlm.training.memory import GIB, MemoryPlan
from vlm.training.setup import build_parts

PLAN = MemoryPlan(
    start=GIB,
    state=GIB,
    batch=0,
    fixed=0.1 * GIB,
    per_row=0.01 * GIB,
    tiles=0,
    rows=1000,
    micro_batch_size=None,
)


def test_a_budget_that_holds_all_needs_no_micro_batches():
    assert PLAN.within(12.2).micro_batch_size is None


@pytest.mark.parametrize(("budget", "size"), [(12.0, 500), (5.2, 250), (2.205, 10), (2.111, 1)])
def test_micro_batches_are_the_fewest_that_fit_and_of_one_size(budget, size):
    found = PLAN.within(budget)
    assert found.micro_batch_size == size
    assert found.total <= budget * GIB


def test_a_budget_for_no_sample_says_what_would_do():
    with pytest.raises(ConfigError, match=r"2.1 GiB hold no sample at a time; 2.2 GiB would"):
        PLAN.within(2.1)


def build(config, **changes):
    return build_parts(load_config(config, changes), Ranks())


def test_a_budget_chooses_the_micro_batch_of_the_run(config):
    size = {"train.global_batch_size": 4096}  # what the process takes differs from time to time
    plain = build(config, **size).memory
    budget = (plain.total - plain.activations / 2) / GIB
    parts = build(config, **size, **{"train.memory_budget_gib": budget})
    assert parts.step.objective.micro_batch_size == parts.memory.micro_batch_size
    assert 500 < parts.memory.micro_batch_size < 3500


def test_a_device_that_has_no_room_for_the_batch_chooses_too(config, monkeypatch, capsys):
    size = {"train.global_batch_size": 4096}
    plain = build(config, **size).memory
    assert plain.micro_batch_size is None
    room = (plain.total - plain.activations / 2) / setup.DEVICE_SHARE
    monkeypatch.setattr(setup, "memory_bytes", lambda device: int(room))  # as a GPU of that size
    found = build(config, **size).memory.micro_batch_size
    assert 500 < found < 3500
    assert f"4,096 samples a rank has no room in {room * 0.9 / GIB:.0f} GiB" in (
        said := capsys.readouterr().out
    )
    assert f"{found:,} at a time" in said
    assert build(config, **size, **{"train.micro_batch_size": 4000}).memory.micro_batch_size == 4000


def test_a_warm_up_as_long_as_the_run_is_told(config, capsys):
    build(config, **{"optim.warmup_steps": 29})
    assert "warmup" not in capsys.readouterr().out
    build(config, **{"optim.warmup_steps": 30})
    told = "warning: optim.warmup_steps (30) is not less than the run's 30 steps"
    assert told in capsys.readouterr().out


def test_checkpointed_blocks_keep_less(config):
    deep = {"model.image.kwargs.depth": 4, "model.text.depth": 4}
    plain = build(config, **deep).memory
    found = build(config, **deep, **{"train.checkpoint_activations": True}).memory
    assert found.per_row < plain.per_row / 2


@pytest.fixture
def resnet(config, tmp_path):
    """The config with a backbone that has batch norm, and without a captioner."""
    lines = config.read_text().splitlines()
    lines = [line for line in lines if "kwargs" not in line and "captioner" not in line]
    path = tmp_path / "resnet.yaml"
    path.write_text("\n".join(lines).replace("vit_tiny_patch16_224", "resnet10t"))
    return path


def test_counting_leaves_the_statistics_of_batch_norm_alone(resnet):
    parts = build(resnet, **{"model.image.image_size": 32})
    buffers = dict(parts.step.module.named_buffers())
    counts = [value for name, value in buffers.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert not any(map(int, counts))


@pytest.mark.parametrize(
    "change",
    [
        {"train.micro_batch_size": 4},
        {"train.memory_budget_gib": 1.0},
        {"train.checkpoint_activations": True},
    ],
)
def test_batch_norm_refuses_what_computes_again(resnet, change):
    with pytest.raises(ConfigError, match=r"batch norm .*, which would see a sample twice"):
        build(resnet, **{"model.image.image_size": 32}, **change)


def test_the_log_has_the_accounts_and_the_folder_the_prediction(start, metrics, tmp_path):
    start("train.steps=3", f"run.dir={tmp_path}", "train.micro_batch_size=4").finish()
    again = 12 / 16
    for line in metrics(tmp_path):
        assert 0 < line["mfu"] < 1
        # of four forward passes one is a second one, but for the last micro-batch's
        assert line["recomputed"] == pytest.approx(again / (3 + again), abs=0.01)
        assert line["peak_memory_gib"] > 0.1
    predicted = json.loads((tmp_path / "command.json").read_text())["predicted_memory_gib"]
    assert predicted == pytest.approx(line["peak_memory_gib"], rel=0.4)


def test_memory_grows_by_the_line(config):
    # a process's first pass makes the colours' mean and deviation, which stay: not looked at
    sizes = (16, 16, 64)
    _, few, more = (build(config, **{"train.global_batch_size": n}).memory for n in sizes)
    assert more.activations - few.activations == pytest.approx(48 * few.per_row, rel=0.01)
    assert replace(few, rows=64).activations == more.activations


def test_no_memory_is_a_line_with_the_way_out(config, fork_ranks, tmp_path):
    words = ["train", str(config), "train.global_batch_size=8192", f"run.dir={tmp_path / 'run'}"]
    script = Path(__file__).with_name("little_memory.py")
    run = fork_ranks(1, script, WORDS=words)
    assert run.wait() == [ConfigError.exit_code], run.text
    (line,) = run.said()
    assert line.startswith("error: step 1, computing: out of memory")
    assert "train.memory_budget_gib" in line


def test_a_heap_in_pieces_is_tidied_between_steps(config):
    parts = build(config)
    heap = parts.step.heap
    assert heap.planned == parts.memory.total
    gradients = sum(p.nbytes for p in parts.step.module.parameters())
    assert heap.room == parts.memory.of_step + gradients
    heap.planned, heap.steps = 1, 3
    parts.step(0, next(parts.batches(0, Ranks())))
    assert heap.stays > 0
