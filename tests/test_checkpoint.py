import json

import pytest
import torch

from vlm import checkpoint
from vlm.errors import CheckpointError

STATE = {"step": 3, "seed": 0}


def save(folder, step, value=1.0, keep=5):
    groups = {"model": {"weight": torch.full((2, 3), value), "scale": torch.tensor(value)}}
    return checkpoint.save(folder, step, groups, {**STATE, "step": step}, keep=keep)


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 3, value=1.5)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded.state == {"step": 3, "seed": 0}
    assert loaded.groups["model"]["weight"].tolist() == [[1.5] * 3] * 2
    assert loaded.groups["model"]["scale"].shape == ()


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None


def test_the_newest_that_verifies_is_loaded(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    newest = tmp_path / "step-00000003" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert checkpoint.load_newest(tmp_path).path.name == "step-00000001"


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_newest(tmp_path)
    assert len(error.value.problems) == 3
    assert "state.json has another size than was written" in error.value.problems[0]
    assert error.value.exit_code == 5


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / "step-00000001.tmp-abc01234").mkdir(parents=True)
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000002.tmp-abcdef01").mkdir()
    assert checkpoint.load_newest(tmp_path).state["step"] == 1


def test_manifest_lists_every_file(tmp_path):
    path = save(tmp_path, 1)
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    assert listed | {"manifest.json"} == {f.name for f in path.iterdir()}
