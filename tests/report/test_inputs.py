import json
import shutil

import pytest

from vlm.errors import ConfigError, DataError
from vlm.report.inputs import Retrieval, read_run


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_everything_the_other_rooms_write_is_read(run):
    inputs = read_run(run)
    assert inputs.name == "squares"
    assert [(r.task, r.metric) for r in inputs.primary] == [
        ("zero_shot", "acc1"),
        ("retrieval", "text_to_image_recall@10"),
        ("caption", "token_f1"),
    ] * 2
    assert [(d.task, d.split) for d in inputs.details][:2] == [
        ("zero_shot", "val"),
        ("retrieval", "val"),
    ]
    assert isinstance(inputs.details[1], Retrieval)
    assert inputs.setting("train.global_batch_size") == 8
    assert inputs.setting("train.no.such") is None
    assert len(inputs.metrics) == 3


def test_details_of_another_measurement_are_not_shown(copy):
    path = copy / "eval" / "retrieval-val.json"
    path.write_text(path.read_text().replace('"protocol": "', '"protocol": "0', 1))
    assert ("retrieval", "val") not in [(d.task, d.split) for d in read_run(copy).details]


def test_details_are_not_looked_for_outside_the_folder(copy):
    (copy / "eval" / "zero_shot-val.json").rename(copy / "outside.json")
    rows = json.loads((copy / "results.json").read_text())
    for row in rows:
        if row["task"] == "zero_shot":
            row.update(task="x/../..", split="/outside")
    (copy / "results.json").write_text(json.dumps(rows))
    assert "zero_shot" not in {d.task for d in read_run(copy).details}


def test_no_such_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such run folder"):
        read_run(tmp_path / "nowhere")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder: it has none of"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "[{"),
        ("results.json", '[{"task": "zero_shot"}]'),
        ("results.json", "{}"),
        ("command.json", "[]"),
        ("eval/zero_shot-val.json", '{"task": "zero_shot"}'),
        ("eval/zero_shot-val.json", '{"task": "other"}'),
    ],
)
def test_a_damaged_file_is_named(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}: damaged: ") as error:
        read_run(copy)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_yaml_is_still_shown(copy):
    (copy / "config.yaml").write_text("train: [")
    inputs = read_run(copy)
    assert (inputs.config, inputs.settings) == ("train: [", {})
