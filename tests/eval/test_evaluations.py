"""`vlm eval` as processes: two ranks give what one gives; what is finished outlives a kill."""

import json
import time

import pytest
from huggingface_hub import ModelCard

from vlm.eval import suite as suites
from vlm.eval.finished import model_hash
from vlm.eval.suite import evaluate

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


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    return folder


@pytest.fixture
def start(vlm_on):
    """Starts `vlm eval`, five pictures at a time."""
    return lambda world_size, *words: vlm_on(world_size, "eval", *words, "--batch-size", 5)


def details(out):
    folder = out.with_name(f"{out.stem}-eval")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_ranks_write_what_one_writes(start, saved, suite, tmp_path):
    """To the last byte; 13 pictures, one of them broken, in slices of 5 and 8."""
    outs = [tmp_path / "1.json", tmp_path / "2.json"]
    said = [start(1 + i, saved, suite, "--out", out).finish() for i, out in enumerate(outs)]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert details(outs[0]) == details(outs[1])
    assert len(details(outs[0])) == 6
    for line, same in zip(*(text.splitlines()[:-1] for text in said), strict=True):
        assert line == same
    assert "1 of 13 samples skipped: 1 image.truncated" in said[1]


def test_a_problem_of_two_ranks_is_one_line(start, saved, shards, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(f"tasks: [{{task: zero_shot, split: val, data: {shards}, label: breed}}]")
    ranks = start(2, saved, path)
    assert ranks.wait() == [3, 3]
    assert ranks.text.count("error: ") == 1
    assert "error: zero_shot-val: no sample has the field 'breed'" in ranks.text


def test_a_rank_that_dies_ends_the_others_with_a_line(start, saved, suite, tmp_path):
    ranks = start(2, saved, suite, "--out", tmp_path / "out.json")
    wait_for(tmp_path / "out-eval/zero_shot-val.json")
    ranks.processes[1].kill()
    codes = ranks.wait()
    assert codes in ([6, -9], [0, -9]), ranks.text
    if codes[0]:
        assert "error: rank 1 died; rank 0 was at vlm eval; " in ranks.text
        assert "then give the same command again" in ranks.text


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_what_was_finished_before_a_kill_is_not_measured_again(start, saved, suite, tmp_path):
    out = tmp_path / "out.json"
    killed = start(1, saved, suite, "--out", out)
    wait_for(tmp_path / "out-eval/zero_shot-val.json")
    killed.kill()
    assert killed.wait() == [-9]
    kept = details(out)
    assert not out.exists()
    said = start(1, saved, suite, "--out", out).finish()
    assert "zero_shot-val: is finished already" in said
    assert kept.items() <= details(out).items()
    start(1, saved, suite, "--out", tmp_path / "whole.json").finish()
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.fixture
def measured(model, monkeypatch):
    """The names of the tasks that are measured when a suite is evaluated."""

    def measured(path, out, of=model):
        names = []
        run = suites._Session._measured
        monkeypatch.setattr(
            suites._Session,
            "_measured",
            lambda s, task, *a: names.append(task.task) or run(s, task, *a),
        )
        results = evaluate(of, path, out=out, log=lambda line: None)
        monkeypatch.undo()
        assert json.loads(out.read_text()) == results
        return names

    return measured


ALL = ["zero_shot", "retrieval", "caption"]


def test_only_what_changed_is_measured_again(measured, make_model, suite, shards, tmp_path):
    out, labels = tmp_path / "out.json", tmp_path / "names.txt"
    assert measured(suite, out) == ALL
    assert measured(suite, out) == []
    suite.write_text(suite.read_text().replace("templates: none", "templates: simple"))
    assert measured(suite, out) == ["zero_shot"]
    names = ["red", "green", "blue", "yellow", "black", "white"]
    labels.write_text("\n".join(names))
    suite.write_text(suite.read_text().replace("label: label", f"labels: {labels}"))
    assert measured(suite, out) == ["zero_shot"]
    labels.write_text("\n".join([*names, "pink"]))
    assert measured(suite, out) == ["zero_shot"]
    (tmp_path / "out-eval/retrieval-val.json").unlink()
    assert measured(suite, out) == ["retrieval"]
    another = make_model()
    another.model.encoders.logit_scale.data += 0.1
    assert measured(suite, out, of=another) == ALL
    copy = tmp_path / "other-0000.tar"
    copy.write_bytes(shards.read_bytes())
    suite.write_text(suite.read_text().replace(str(shards), str(copy), 1))
    assert measured(suite, out, of=another) == ["zero_shot"]


def test_a_table_of_captions_counts_too(measured, suite, shards, tmp_path):
    out, table = tmp_path / "out.json", tmp_path / "names.tsv"
    table.write_text("label\tname\nred\tA red one.\nblue\tA blue one.\n")
    of = f"{{table: {table}, key: label, column: name}}"
    suite.write_text(f"tasks: [{{task: retrieval, split: val, data: {shards}, captions: {of}}}]")
    assert measured(suite, out) == ["retrieval"]
    assert measured(suite, out) == []
    table.write_text(table.read_text().replace("A blue", "The blue"))
    assert measured(suite, out) == ["retrieval"]


def test_the_hash_is_of_weights_and_all_around_them(model, make_model):
    assert model_hash(make_model()) == model_hash(model)
    assert model_hash(make_model(captioner=False)) != model_hash(model)


def test_the_card_is_what_the_hub_reads(model, suite, tmp_path):
    out = tmp_path / "run" / "results.json"
    rows = evaluate(model, suite, out=out, log=lambda line: None)
    text = out.with_suffix(".md").read_text()
    read = ModelCard(text).data.eval_results
    assert [(r.metric_type, r.metric_value) for r in read] == [
        (r["metric"], r["value"]) for r in rows
    ]
    assert read[0].task_type == "zero-shot-image-classification"
    assert (read[0].dataset_name, read[0].dataset_revision) == (
        "val", json.loads((tmp_path / "run/eval/zero_shot-val.json").read_text())["fingerprint"],
    )  # fmt: skip
    assert text.count(f"`{rows[0]['protocol']}` |") == sum(r["task"] == "zero_shot" for r in rows)
    assert f"sha256 `{model_hash(model)}`" in text
    assert f"`vlm eval MODEL {suite} --out {out}`" in text
