"""`vlm checkpoint list` and `verify`: a table, and exit code 5 where the newest is damaged."""

import pytest
import torch

from vlm import checkpoint
from vlm.cli.main import main


@pytest.fixture
def run(tmp_path):
    """A run folder with three checkpoints, the first the best."""
    for step, loss in ((10, 1.25), (20, 2.0), (30, 3.0)):
        state = {"metric": {"rule": "min:loss", "value": loss}}
        groups = {"model": {"weight": torch.zeros(1000)}}
        folder = tmp_path / "run/checkpoints"
        checkpoint.save(folder, step, groups, state, keep=2, keep_best="min:loss")
    return tmp_path / "run"


def damage(run, step):
    path = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rows(capsys):
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    return [words for words in lines if words and words[0].isdigit()], captured.err


def test_a_sound_run_is_listed_and_verified(run, capsys):
    assert main(["checkpoint", "list", str(run)]) == 0
    table, _ = rows(capsys)
    assert [words[0] for words in table] == ["10", "20", "30"]
    assert table[0][4:] == ["all", "there;", "min:loss", "1.25", "(best)"]
    assert table[1][4:] == ["all", "there;", "min:loss", "2"]
    assert main(["checkpoint", "verify", str(run)]) == 0
    table, _ = rows(capsys)
    assert [words[4] for words in table] == ["verified;"] * 3


def test_an_older_damaged_checkpoint_is_named_and_a_newest_one_is_exit_5(run, capsys):
    damage(run, 20)
    assert main(["checkpoint", "verify", str(run)]) == 0
    table, _ = rows(capsys)
    assert "model.safetensors has other bytes than were written;" in " ".join(table[1])
    damage(run, 30)
    assert main(["checkpoint", "list", str(run)]) == 0  # names and sizes are right
    rows(capsys)
    assert main(["checkpoint", "verify", str(run)]) == 5
    _, error = rows(capsys)
    assert error.startswith(f"error: {run}: the newest checkpoint is damaged: model.safetensors ")
    assert "; 1 of 3 are sound; vlm train --resume auto continues" in error
    assert error.count("\n") == 1


def test_a_run_without_checkpoints_and_a_missing_folder(tmp_path, capsys):
    for verb in ("list", "verify"):
        assert main(["checkpoint", verb, str(tmp_path)]) == 5
        assert capsys.readouterr().err == f"error: {tmp_path} has no checkpoints\n"
    assert main(["checkpoint", "list", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
