"""`vlm train CONFIG --profile`: where the time of a step goes, and that a run stays as it is."""

import contextlib
import io
import json
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from vlm.cli.main import main
from vlm.config.load import load_config
from vlm.errors import ConfigError
from vlm.runtime.distributed import Ranks
from vlm.training import marks
from vlm.training.marks import BACKWARD, FORWARD, Marks, marked
from vlm.training.setup import build_parts

OF_A_STEP = [part for part in marks.PARTS if part not in (marks.RECOMPUTED, marks.RANKS)]


RUN = {
    "config.yaml": b"train: {steps: 8}\n",
    "metrics.jsonl": b'{"step": 8, "time_s": 1.0}\n{"step"',
    "checkpoints/step-00000008/model.safetensors": b"to be read by nobody",
    "checkpoints/step-00000008/state.json": b"{}",
    "model/config.json": b"{}",
    "PREEMPTED": b"",
}


@pytest.fixture(scope="module")
def profiled(config, tmp_path_factory):
    """What `--profile` prints and writes, in the folder of a run."""
    folder = tmp_path_factory.mktemp("runs") / "profiled"
    for name, data in RUN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", str(config), "--profile", f"run.dir={folder}"]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def numbers(profiled):
    return json.loads((profiled[0] / "profile" / "profile.json").read_text())


def test_a_run_that_is_there_keeps_every_byte(profiled):
    folder = profiled[0]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    files = {name: path for name, path in files.items() if path.is_file()}
    assert files.keys() - RUN.keys() == {"profile/profile.json", "profile/trace.json"}
    assert {name: files[name].read_bytes() for name in RUN} == RUN


def test_the_parts_add_up_to_the_step(numbers):
    assert [row["part"] for row in numbers["rows"]] == OF_A_STEP
    assert all(row["seconds"] >= 0 for row in numbers["rows"])
    total = sum(row["seconds"] for row in numbers["rows"])
    assert total == pytest.approx(sorted(numbers["step_s"])[1])
    assert numbers["seconds"] == pytest.approx(total)


def test_the_needed_arithmetic_adds_up_to_the_steps(numbers):
    rows = {row["part"]: row["flops"] for row in numbers["rows"]}
    assert sum(flops or 0 for flops in rows.values()) == pytest.approx(numbers["needed_flops"])
    assert rows[BACKWARD + marks.TEXT] == 2 * rows[FORWARD + marks.TEXT]
    assert rows[marks.OPTIMIZER] is None
    rate = numbers["needed_flops"] / numbers["seconds"]
    assert numbers["mfu"] == pytest.approx(rate / numbers["peak"]["flops_per_s"])


def test_the_table_names_every_part(profiled, numbers):
    lines = profiled[1].splitlines()
    words = {line.split("  ")[0].strip() or line.split("  ")[1].strip() for line in lines}
    assert words >= {part.rpartition(": ")[2] for part in OF_A_STEP} | {"forward", "backward"}
    total = next(line for line in lines if line.strip().startswith("step  "))
    assert f"{numbers['seconds'] * 1e3:,.1f}" in total
    assert "100.0%" in total
    assert max(map(len, lines[: lines.index(total)])) <= 80


def test_the_slowest_operators_are_told(profiled, numbers):
    operators = numbers["operators"]
    assert len(operators) == 10
    assert [each["seconds"] for each in operators] == sorted(
        (each["seconds"] for each in operators), reverse=True
    )
    assert 0 < sum(each["share"] for each in operators) <= 1 + 1e-9
    assert all(each["name"][:40] in profiled[1] for each in operators)


def test_the_trace_has_our_parts_one_after_the_other(profiled):
    events = json.loads((profiled[0] / "profile" / "trace.json").read_text())["traceEvents"]
    found = [each for each in events if each.get("name") in marks.PARTS and each.get("ph") == "X"]
    assert {each["name"] for each in found} == set(OF_A_STEP)
    found.sort(key=lambda each: each["ts"])
    for one, following in pairwise(found):
        assert one["ts"] + one["dur"] <= following["ts"] + 0.01  # microseconds, rounded
    assert any(each.get("name") == "aten::addmm" for each in events)


def test_profile_and_check_exclude_each_other(config):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(["train", str(config), "--check", "--profile"]) == ConfigError.exit_code
    assert "--profile" in err.getvalue()


def test_the_help_explains_it(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--profile take a few steps with fresh weights" in text
    assert "profile/trace.json" in text


@pytest.fixture(scope="module")
def built(config):
    return build_parts(load_config(config), Ranks())


@pytest.fixture(scope="module", params=[None, 8], ids=["whole", "micro-batches"])
def parts(request, built):
    objective = replace(built.step.objective, micro_batch_size=request.param)
    return replace(built, step=replace(built.step, objective=objective))


@pytest.fixture(scope="module")
def batch(parts):
    batches = parts.batches(0, Ranks())
    batch = next(batches)
    batches.close()
    return batch


def test_no_moment_is_lost_or_counted_twice(parts, batch):
    watch = Marks(parts.step.device)
    with marked(parts.step, watch):
        start = time.perf_counter()
        watch.start(marks.OTHER)
        parts.step(0, batch)
        watch.stop()
        elapsed = time.perf_counter() - start
    assert sum(watch.seconds.values()) == pytest.approx(elapsed, abs=2e-3)
    in_parts = parts.step.objective.micro_batch_size is not None
    assert (marks.RECOMPUTED in watch.seconds) == in_parts


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("encoders.image.projection.weight", marks.IMAGE),
        ("encoders.image.trunk.patch_embed.proj.weight", marks.IMAGE),
        ("encoders.text.token_embedding.weight", marks.TEXT),
        ("encoders.text.projection.weight", marks.TEXT),
        ("captioner.norm_image.weight", marks.CAPTIONER),
        ("captioner.norm.weight", marks.CAPTIONER),
        ("encoders.logit_scale", marks.LOSS),
    ],
)
def test_a_gradient_is_computed_in_its_part(parts, batch, where, part):
    watch, seen = Marks(parts.step.device), []
    parameter = dict(parts.step.module.named_parameters())[where]
    handle = parameter.register_hook(lambda _: seen.append(watch.part))
    with marked(parts.step, watch):
        parts.step(0, batch)
    handle.remove()
    assert seen == [BACKWARD + part]


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("encoders.image.trunk.blocks.0", marks.IMAGE),
        ("encoders.text.blocks.0", marks.TEXT),
        ("captioner.blocks.0", marks.CAPTIONER),
    ],
)
def test_a_module_runs_in_its_part(parts, batch, where, part):
    watch, seen = Marks(parts.step.device), []
    module = parts.step.module.get_submodule(where)
    handle = module.register_forward_hook(lambda *_: seen.append(watch.part))
    with marked(parts.step, watch):
        parts.step(0, batch)
    handle.remove()
    again = [marks.RECOMPUTED] if parts.step.objective.micro_batch_size else []
    assert seen == ([FORWARD + part] * 2 + again if again else [FORWARD + part])


def test_marks_change_no_number_and_leave_nothing_behind(parts, batch):
    step, module = parts.step, parts.step.module
    owners = (step, step.objective, step.averaged)
    attributes = [set(vars(each)) for each in owners]
    found = []
    for marks_or_none in (Marks(step.device), None):
        with marked(step, marks_or_none) if marks_or_none else contextlib.nullcontext():
            torch.manual_seed(0)
            step.objective(step.model, batch).loss.backward()
        found.append([parameter.grad.clone() for parameter in module.parameters()])
        module.zero_grad()
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    assert [set(vars(each)) for each in owners] == attributes
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert not any(each._optimizer_step_pre_hooks for each in step.optimizers)
    assert torch.autograd.is_multithreading_enabled()


@pytest.mark.long
def test_of_two_ranks_one_speaks(start, tmp_path):
    out = start("--profile", f"run.dir={tmp_path}", world_size=2).finish()
    assert out.count("the 10 slowest operators") == 1
    assert marks.RANKS in out
    assert "8 samples a rank, 2 rank(s)" in out
    assert (tmp_path / "profile" / "trace.json").exists()
