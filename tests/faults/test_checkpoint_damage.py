"""A4: damage on disk is always noticed, and the newest whole checkpoint is used."""

import random
import shutil

import pytest
import torch

from vlm import checkpoint
from vlm.errors import CheckpointError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        tensors = {"weight": torch.arange(500.0) + step}
        state = {"step": step, "fingerprint": "data"}
        checkpoint.save(folder, step, {"model": tensors, "ema": tensors}, state, keep=2)
    return folder


def copy(pair, tmp_path):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pair, folder)
    return folder, folder / "step-00000002"


def noticed(folder, name):
    """The damaged newest is passed over for the older one, and the reason names the file."""
    loaded = checkpoint.load_newest(folder)
    ((path, problem),) = loaded.skipped.items()
    assert path.name == "step-00000002"
    assert loaded.state["step"] == 1
    assert loaded.groups["model"]["weight"][0] == 1
    assert name in problem, problem
    return True


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


@pytest.mark.parametrize("flips", [25, pytest.param(100, marks=pytest.mark.long)])
def test_every_flipped_bit_is_noticed(pair, tmp_path, record, flips):
    places = [
        (file.name, bit)
        for file in sorted((pair / "step-00000002").iterdir())
        for bit in range(file.stat().st_size * 8)
    ]
    rng = random.Random(flips)
    for name in ("manifest.json", "state.json"):  # the small files, a few flips each at least
        places += rng.choices([place for place in places if place[0] == name], k=len(places) // 8)
    for name, bit in rng.sample(places, flips):
        folder, newest = copy(pair, tmp_path)
        flip_bit(newest / name, bit)
        assert noticed(folder, name), (name, bit)
    record("A4", "one flipped bit in a random file of the newest", flips, "all noticed")


@pytest.mark.parametrize("name", ["ema.safetensors", "manifest.json", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "zero page", "gone"])
def test_damaged_files_are_noticed(pair, tmp_path, record, name, damage):
    folder, newest = copy(pair, tmp_path)
    path = newest / name
    data = path.read_bytes()
    changed = {
        "truncated": data[:-1],
        "empty": b"",
        "longer": data + b"\0",
        "zero page": bytes(min(1024, len(data))) + data[1024:],
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    assert noticed(folder, "manifest.json" if damage == "gone" else name)
    record("A4", f"a file of the newest {damage}: {name}", 1, "noticed, older used")


def test_swapped_and_foreign_files_are_noticed(pair, tmp_path, record):
    folder, newest = copy(pair, tmp_path)
    a, b = newest / "model.safetensors", newest / "state.json"
    a_data, b_data = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_data)
    b.write_bytes(a_data)
    assert noticed(folder, "model.safetensors")
    folder, newest = copy(pair, tmp_path)
    (newest / "extra.safetensors").write_bytes(a_data)
    assert noticed(folder, "other files than")
    record("A4", "swapped or added files in the newest", 2, "noticed, older used")


def test_all_damaged_is_exit_code_5(pair, tmp_path, record):
    folder, newest = copy(pair, tmp_path)
    for path in (newest, folder / "step-00000001"):
        flip_bit(path / "model.safetensors", 4000)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_newest(folder)
    assert error.value.exit_code == 5
    assert len(error.value.problems) == 3
    record("A4", "one flipped bit in every checkpoint", 1, "exit 5, each named")
