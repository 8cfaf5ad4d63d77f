"""`vlm data pack`, `index` and `show`, each through its own parser."""

import argparse
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from vlm.cli import data_index, data_pack, data_show
from vlm.cli.main import main
from vlm.errors import ConfigError


def run(verb: ModuleType, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    code = verb.run(parser.parse_args([str(argument) for argument in arguments]))
    assert isinstance(code, int)
    return code


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(f"{number}.png")
    names = "".join(f"{number}.png,caption {number}\n" for number in range(4))
    Path("photos.csv").write_text(f"image,caption\n{names}")
    return "photos.csv"


def test_pack_then_index_then_show(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data_pack, table, "out") == 0
    assert capsys.readouterr().out == (
        'photos.csv: image column "image", caption column "caption"\n'
        "photos.csv: left out 1 image.missing: 3.png (no such file)\n"
        "out: 3 samples in 1 shard\n"
    )
    assert run(data_index, "out/*.tar") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "shard      samples  bytes  left out",
        "00000.tar        3  10240  0",
        "1 shard          3  10240  0",
    ]
    assert lines[3].startswith("fingerprint ")
    assert run(data_show, "out", "--out", "sheet.png", "--n", 2) == 0
    assert capsys.readouterr().out == "sheet.png: 2 of 3 samples\n"
    with Image.open("sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_index_lists_damage_by_reason(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(data_pack, table, "out")
    path = Path("out/00000.tar")
    path.write_bytes(path.read_bytes()[:5000])
    capsys.readouterr()
    assert run(data_index, "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("00000.tar: 2 samples; left out: 1 shard.truncated, 1 sample.")
    assert lines[2] == "00000.tar        2   5000  1 shard.truncated, 1 sample.no_image"


def test_packing_shards_again_is_refused(table: str) -> None:
    run(data_pack, table, "out")
    with pytest.raises(ConfigError, match="shards are packed already"):
        run(data_pack, "out", "again")


def test_sizes_and_counts_below_one_are_refused(table: str) -> None:
    with pytest.raises(ConfigError, match="--shard-size-mb"):
        run(data_pack, table, "out", "--shard-size-mb", 0)
    with pytest.raises(ConfigError, match="--n"):
        run(data_show, table, "--out", "sheet.png", "--n", 0)


@pytest.mark.parametrize("verb", ["show", "stats", "dedup"])
def test_a_picture_under_another_suffix_is_refused(
    table: str, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert main(["data", verb, table, "--out", "sheet.xyz"]) == 2
    assert capsys.readouterr().err == (
        "error: argument --out: sheet.xyz: a PNG is written; name it .png; "
        f"see vlm data {verb} --help\n"
    )
    assert not Path("sheet.xyz").exists()
