import json

import pytest

from vlm.errors import ConfigError, DataError
from vlm.eval.finished import why_not
from vlm.eval.suite import check_suite, evaluate, load_suite, render

SUITE = """
tasks:
- {{task: zero_shot, split: val, data: {data}, label: label, templates: none}}
- {{task: retrieval, split: val, data: {data}}}
- {{task: caption, split: val, data: {data}}}
"""


@pytest.fixture
def suite(shards, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.format(data=shards))
    return path


def test_evaluate_returns_and_writes_all_results(model, suite, tmp_path):
    lines = []
    out = tmp_path / "run" / "results.json"
    results = evaluate(model, suite, out=out, log=lines.append)
    assert json.loads(out.read_text()) == results
    assert {path.name for path in (tmp_path / "run" / "eval").iterdir()} == {
        f"{task}-val.{suffix}"
        for task in ("zero_shot", "retrieval", "caption")
        for suffix in ("json", "safetensors")
    }
    assert list(results[0]) == [
        "task", "split", "metric", "value", "ci95", "n", "chance", "protocol",
    ]  # fmt: skip
    primary = {result["task"]: result["metric"] for result in reversed(results)}
    assert primary == {
        "zero_shot": "acc1",
        "retrieval": "text_to_image_recall@10",
        "caption": "token_f1",
    }
    assert "acc1" in lines[-1]
    details = json.loads((tmp_path / "run/eval/caption-val.json").read_text())
    assert details["protocol"] == results[-1]["protocol"]


def test_results_under_another_name_do_not_share_details(model, suite, tmp_path):
    evaluate(model, suite, out=tmp_path / "a.json", log=lambda _: None)
    assert (tmp_path / "a-eval" / "zero_shot-val.json").is_file()


def test_a_model_without_captioner_does_the_other_tasks(model, suite, monkeypatch):
    monkeypatch.setitem(model.model._modules, "captioner", None)
    lines = []
    results = evaluate(model, suite, log=lines.append)
    assert {result["task"] for result in results} == {"zero_shot", "retrieval"}
    assert lines[0].startswith("left out: caption-val: this model has no captioner")


def test_a_suite_that_does_not_fit_the_model_at_all_is_an_error(
    model, shards, tmp_path, monkeypatch
):
    monkeypatch.setitem(model.model._modules, "captioner", None)
    path = tmp_path / "suite.yaml"
    path.write_text(f"tasks: [{{task: caption, split: val, data: {shards}}}]")
    with pytest.raises(ConfigError, match=r"no captioner; model\.captioner\.width"):
        evaluate(model, path)


def test_what_a_suite_names_is_looked_at_before_any_picture(model, shards, tmp_path, monkeypatch):
    path = tmp_path / "suite.yaml"
    monkeypatch.setattr(model, "encode_pixels", None)  # an error if a picture is encoded
    for wrong, problem in (
        ("labels: clases.txt", "zero_shot-val: labels file clases.txt: can't be read"),
        ("templates: sinple", "zero_shot-val: templates 'sinple' is neither"),
    ):
        path.write_text(f"tasks: [{{task: zero_shot, split: val, data: {shards}, {wrong}}}]")
        with pytest.raises(ConfigError, match=problem):
            evaluate(model, path)
        with pytest.raises(ConfigError, match=problem):
            check_suite(path)
    path.write_text("tasks: [{task: caption, split: val, data: nowhere-*.tar}]")
    with pytest.raises(DataError, match=r"caption-val: .*nowhere"):
        check_suite(path)


def test_a_markdown_file_is_no_place_for_results(model, suite, tmp_path):
    assert "give a .json" in why_not(tmp_path / "out.md", model, [])


def test_a_problem_of_a_task_names_the_task(model, shards, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(f"tasks: [{{task: zero_shot, split: val, data: {shards}, label: breed}}]")
    with pytest.raises(DataError, match="zero_shot-val: no sample has the field 'breed'"):
        evaluate(model, path, log=lambda _: None)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("tasks: []", ["the list of tasks is empty"]),
        ("zero_shot", ["a suite is `tasks:`"]),
        ("tasks: [", [":1: not YAML"]),
        ("tasks: [{task: zero_shot, split: a, data: d}]\ntask: 1", ["'task'; did you mean tasks?"]),
        ("tasks: [{task: zeroshot, split: a, data: d}]", ["task 1: ", "did you mean zero_shot?"]),
        ("tasks: [{split: a}]", ["needs `task:`, one of zero_shot, retrieval, caption"]),
        ("tasks: [{task: retrieval}]", ["needs `split:`", "needs `data:`"]),
        (
            "tasks: [{task: zero_shot, split: a, data: d, template: none}]",
            ["unknown key 'template'; did you mean templates?"],
        ),
        ("tasks: [{task: caption, split: a/../b, data: d}]", ["split must be a short name"]),
        (
            "tasks: [{task: caption, split: a, data: 5}]",
            ["data (5): input should be a valid string"],
        ),
        (
            "tasks: [{task: caption, split: a, data: d}, {task: caption, split: a, data: e}]",
            ["caption-a is listed 2 times"],
        ),
        ("tasks: [{task: caption, split: a, split: b, data: d}]", ["duplicate key"]),
        ("tasks: !!python/object/apply:os.system ['true']", ["tag"]),
    ],
)
def test_a_wrong_suite_names_every_problem(tmp_path, text, problems):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_suite(path)
    for problem in problems:
        assert problem in str(error.value)
    assert all(str(path) in line for line in error.value.problems)


def test_a_labels_file_names_the_classes(model, shards, tmp_path):
    names = "red\ngreen\nblue\n\nyellow\nblack\nwhite\npink\n"
    (tmp_path / "names.txt").write_text(names)
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"tasks: [{{task: zero_shot, split: a, data: {shards}, labels: {tmp_path}/names.txt}}]"
    )
    with pytest.raises(ConfigError, match="label 4 of 8 is blank"):  # or numbers would shift
        evaluate(model, path)
    (tmp_path / "names.txt").write_text(names.replace("\n\n", "\n") + "\n\n")
    results = evaluate(model, path, log=lambda _: None)
    assert results[0]["chance"] == 1 / 7


def test_the_table_is_plain_text():
    row = {"task": "t", "split": "s", "value": 0.5, "ci95": [0.25, 0.75], "n": 1234, "chance": 0.1}
    text = render([{**row, "metric": "acc1"}, {**row, "metric": "median_rank", "value": 3.0}])
    assert "50.00%   25.00% .. 75.00%   10.00%   1,234" in text
    points = render([{**row, "metric": "cider_d"}, {**row, "metric": "length", "value": 7.25}])
    assert "0.500   0.250 .. 0.750    0.100   1,234" in points
    assert "7.2 " in points
    assert "1,234" in text
    assert "3.0" in text
    assert "\x1b" not in text
