"""DATA means the same everywhere: shards, a folder or a table, packed once."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vlm.curate.source import open_data
from vlm.errors import ConfigError, DataError

MakePicture = Callable[..., bytes]


@pytest.fixture
def table(tmp_path: Path, make_picture: MakePicture, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three captioned pictures, in the folder where the test runs; the cache is in it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(3):
        make_picture(f"{number}.png", number)
    rows = [f"{number}.png,caption {number}\n" for number in range(3)]
    (tmp_path / "photos.csv").write_text("filepath,title\n" + "".join(rows))
    return Path("photos.csv")


def packs(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache/vlm/packed").iterdir() if path.is_dir()]


def test_a_table_is_packed_once_and_found_again(tmp_path: Path, table: Path) -> None:
    lines: list[str] = []
    dataset = open_data("photos.csv", log=lines.append)
    assert list(dataset.captions()) == ["caption 0", "caption 1", "caption 2"]
    (folder,) = packs(tmp_path)
    columns = 'photos.csv: image column "filepath", caption column "title"'
    assert lines == [columns, f"photos.csv: packed 3 pictures into {folder}"]
    again = open_data("photos.csv", log=lines.append)
    assert lines[2:] == [columns]
    assert again.fingerprint == dataset.fingerprint


@pytest.mark.parametrize("change", ["table", "image", "column", "missing"])
def test_a_change_packs_anew(
    tmp_path: Path, table: Path, make_picture: MakePicture, change: str
) -> None:
    (tmp_path / "2.png").unlink() if change == "missing" else None
    lines: list[str] = []
    open_data("photos.csv", log=lines.append)
    options: dict[str, Any] = {}
    if change == "table":
        table.write_text(table.read_text().replace("caption 2", "another 2"))
        os.utime(table, ns=(0, 0))
    elif change == "image":
        make_picture("2.png", 7)
        os.utime("2.png", ns=(0, 0))
    elif change == "column":
        options = {"caption_column": "filepath"}
    else:
        make_picture("2.png", 2)
    assert len(open_data("photos.csv", log=lines.append, **options)) == 3
    assert len(packs(tmp_path)) == 2


def test_a_pack_of_an_older_version_is_made_anew(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vlm.curate.source.PACK_VERSION", 1)  # had no list of labels
        open_data("photos.csv", log=lambda line: None)
    open_data("photos.csv", log=lambda line: None)
    assert len(packs(tmp_path)) == 2


def test_what_a_pack_left_out_is_told_every_time(tmp_path: Path, table: Path) -> None:
    (tmp_path / "1.png").unlink()
    told = "photos.csv: left out 1 image.missing: 1.png (no such file)"
    for _ in range(2):
        lines: list[str] = []
        assert len(open_data("photos.csv", log=lines.append)) == 2
        assert told in lines


def test_a_folder_of_pictures_is_packed_once(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture("pets/cat/a.png", 1)
    make_picture("pets/dog/b.png", 2)
    lines: list[str] = []
    for _ in range(2):
        dataset = open_data(str(tmp_path / "pets"), cache_dir=tmp_path / "c", log=lines.append)
        assert [meta["label"] for meta in dataset.metas()] == ["cat", "dog"]
    assert len(lines) == 1
    (tmp_path / "pets/cat/a.txt").write_text("a cat")
    dataset = open_data(str(tmp_path / "pets"), cache_dir=tmp_path / "c", log=lines.append)
    assert list(dataset.captions()) == ["a cat"]


def test_a_folder_of_tars_is_shards(tmp_path: Path, table: Path) -> None:
    open_data("photos.csv", log=lambda line: None)
    (folder,) = packs(tmp_path)
    for data in (str(folder), f"{folder}/*.tar", [str(folder), f"{folder}/00000.tar"]):
        assert len(open_data(data, log=pytest.fail)) == 3


def test_a_pack_that_lost_a_shard_is_an_error(tmp_path: Path, table: Path) -> None:
    open_data("photos.csv", log=lambda line: None)
    (folder,) = packs(tmp_path)
    (folder / "00000.tar").unlink()
    with pytest.raises(DataError, match="a part of this pack is gone; delete the folder"):
        open_data("photos.csv", log=lambda line: None)


def test_what_a_killed_pack_left_behind_is_removed(tmp_path: Path, table: Path) -> None:
    open_data("photos.csv", log=lambda line: None)
    (folder,) = packs(tmp_path)
    left = folder.with_name(f".{folder.name}.abc")
    folder.rename(left)
    open_data("photos.csv", log=lambda line: None)
    assert packs(tmp_path) == [folder]


def test_a_table_that_is_opened_several_times_at_once_is_packed_once(
    tmp_path: Path, table: Path
) -> None:
    def lines_of_opening(_: int) -> int:
        lines: list[str] = []
        assert len(open_data("photos.csv", log=lines.append)) == 3
        return len(lines)

    with ThreadPoolExecutor(4) as pool:  # the lock is a file's, so threads exclude each other too
        assert sorted(pool.map(lines_of_opening, range(4))) == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("data", "options", "problem"),
    [
        ("x.tar", {"image_column": "a"}, '--image-column "a" is for tables, but x.tar is shards'),
        (
            "pets",
            {"caption_column": "a"},
            '--caption-column "a" is for tables, but pets is a folder',
        ),
        (
            ["x.tar", "photos.csv"],
            {},
            "photos.csv: only shards can be joined; pack it first: vlm data pack",
        ),
        (
            "pipe:id",
            {},
            '"pipe:id": shards are files, https:// or what fsspec knows (s3://, gs://); '
            "no commands",
        ),
    ],
)
def test_settings_that_do_not_fit_are_errors(
    table: Path, data: Any, options: dict[str, str], problem: str
) -> None:
    Path("pets").mkdir()
    Path("x.tar").touch()
    with pytest.raises(ConfigError) as caught:
        open_data(data, log=pytest.fail, **options)
    assert str(caught.value) == problem


def test_a_folder_that_is_not_there_is_an_error(table: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_data("pictures/")
    assert str(caught.value).startswith("pictures/: no such folder; the folder . holds ")


def test_a_table_that_is_not_there_is_an_error(table: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_data("photo.csv", log=pytest.fail)
    assert str(caught.value) == "photo.csv: no such file; the folder . holds photos.csv"


def test_captions_can_be_required(table: Path, make_picture: MakePicture) -> None:
    table.write_text("image,label\n0.png,cat\n")
    with pytest.raises(DataError, match="no sample has a caption"):
        open_data("photos.csv", require_captions=True, log=lambda line: None)


def test_the_report_of_a_pack_is_readable(tmp_path: Path, table: Path) -> None:
    open_data("photos.csv", log=lambda line: None)
    (folder,) = packs(tmp_path)
    assert json.loads((folder / "pack.json").read_text())["num_samples"] == 3
