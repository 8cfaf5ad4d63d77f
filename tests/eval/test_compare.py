import json
import shutil

import pytest

from vlm.cli.main import main
from vlm.errors import ConfigError
from vlm.eval.compare import compare, markdown
from vlm.eval.suite import evaluate
from vlm.inference import VisionLanguageModel

SUITE = """
tasks:
- {{task: zero_shot, split: val, data: {data}, templates: {templates}}}
- {{task: retrieval, split: val, data: {data}}}
- {{task: caption, split: val, data: {data}}}
"""


@pytest.fixture(scope="session")
def measure(make_model, shards, tmp_path_factory):
    """A run folder: a model measured, whose temperature and first text layer are scaled."""
    import torch

    def measure(name, *, factor=1.0, templates="none", lr=1e-3):
        folder = tmp_path_factory.mktemp("runs") / name
        made = make_model()
        with torch.no_grad():
            for parameter in made.model.encoders.text.parameters():
                parameter.mul_(factor)
        model = VisionLanguageModel(made.model, made.config, made.tokenizer, made.device)
        suite = folder.with_suffix(".yaml")
        suite.write_text(SUITE.format(data=shards, templates=templates))
        evaluate(model, suite, out=folder / "results.json", log=lambda line: None)
        (folder / "config.yaml").write_text(f"run: {{dir: {name}}}\noptim: {{lr: {lr}}}\n")
        return folder

    return measure


@pytest.fixture(scope="session")
def first(measure):
    return measure("first")


@pytest.fixture(scope="session")
def second(measure):
    return measure("second", factor=-3.0, lr=2e-3)


def test_every_task_is_tested_on_its_samples(first, second):
    found = compare([first, second])
    assert [row.result.name for row in found.rows[::2]] == [
        "zero_shot-val", "retrieval-val", "caption-val",
    ]  # fmt: skip
    for ours, theirs in zip(found.rows[::2], found.rows[1::2], strict=True):
        assert ours.gain is None
        assert theirs.difference.value == pytest.approx(theirs.result.value - ours.result.value)
        assert theirs.difference.ci95[0] <= theirs.gain <= theirs.difference.ci95[1]
        assert theirs.corrected_p >= theirs.difference.p > 0
    assert found.rows[3].result.metric == "text_to_image_recall@10"
    assert [key for key, _ in found.settings] == ["optim.lr"]


def test_a_run_does_not_differ_from_itself(first):
    found = compare([first, first])
    assert {row.difference.p for row in found.rows if row.difference} == {1.0}


def test_what_was_measured_differently_is_not_compared_and_the_part_is_named(first, measure):
    found = compare([first, measure("other", templates="simple")])
    assert {row.result.task for row in found.rows} == {"retrieval", "caption"}
    (line,) = found.left_out
    assert line.startswith("zero_shot-val: ")
    assert 'templates ["{}"] and ["a photo of a {}."]' in line


def test_nothing_to_compare_is_an_error(first, tmp_path):
    rows = json.loads((first / "results.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps([{**r, "protocol": "0" * 16} for r in rows]))
    with pytest.raises(ConfigError, match="details that say in what are missing"):
        compare([first, tmp_path / "other.json"])
    with pytest.raises(ConfigError, match="two runs or more"):
        compare([first])
    with pytest.raises(ConfigError, match=r"results\.json: no such file; vlm eval"):
        compare([first, tmp_path])


def test_without_details_values_are_shown_and_not_tested(first, tmp_path):
    shutil.copy(first / "results.json", tmp_path / "bare.json")
    found = compare([first, tmp_path / "bare.json"])
    assert [row.difference for row in found.rows] == [None] * 6
    assert "Not tested, for scores of each sample are missing: zero_shot-val" in markdown(found)


def test_the_command_prints_and_writes_it(first, second, tmp_path, capsys):
    out = tmp_path / "compared.md"
    assert main(["compare", str(first), str(second), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "optim.lr" in said
    assert "retrieval-val" in said
    assert "Of 3 tests, chance alone makes 0.15 smaller than 0.05" in said
    page = out.read_text()
    assert page.count("| zero_shot-val | acc1 | 12 |") == 1
    assert main(["compare", str(first), str(second), "--out", str(out)]) == 2
