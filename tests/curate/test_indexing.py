"""Many shards indexed: by processes, by ranks, resumed, joined into one file, beside any URL."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest

from vlm.cli.main import main
from vlm.curate.indexing import Wanted, index_shards
from vlm.curate.store import Store
from vlm.data.dataset import open_shards
from vlm.data.joined import NAME
from vlm.errors import ConfigError, DataError

GIF = b"GIF89a\x01\0\x01\0\x80\0\0\xff\0\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"


def write_shard(path: Path, num_samples: int = 2) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num_samples):
            meta = json.dumps({"caption": f"{path.stem} {number}", "score": number}).encode()
            for suffix, data in (("gif", GIF), ("json", meta)):
                info = tarfile.TarInfo(f"{number:04}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    return [write_shard(tmp_path / f"in/{number}.tar", number + 1) for number in range(5)]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.idx")}


def test_processes_index_as_one_does(tars: list[Path]) -> None:
    beside = index_shards(tars, Wanted(), num_workers=2)
    assert beside is not None
    written = [path.read_bytes() for path in sorted(tars[0].parent.glob("*.idx"))]
    assert [index.num_samples for index in beside] == [1, 2, 3, 4, 5]
    for path in tars[0].parent.glob("*.idx"):
        path.unlink()
    index_shards(tars, Wanted())
    assert [path.read_bytes() for path in sorted(tars[0].parent.glob("*.idx"))] == written


def test_ranks_share_the_shards_and_the_last_one_joins_them(
    tars: list[Path], tmp_path: Path
) -> None:
    wanted = Wanted(out=Store(str(tmp_path / "out")))
    assert index_shards(tars, wanted, rank=1, world_size=3) is None
    assert sorted(times(tmp_path / "out")) == ["1.tar.idx", "4.tar.idx"]
    assert index_shards(tars, wanted, rank=0, world_size=3) is None
    assert not (tmp_path / "out" / NAME).exists()
    shards = index_shards(tars, wanted, rank=2, world_size=3)
    assert shards is not None
    assert [shard.path for shard in shards] == tars
    assert len(open_shards(str(tmp_path / "out" / NAME))) == 15


def test_a_shard_with_a_true_index_is_not_read_again(tars: list[Path], tmp_path: Path) -> None:
    wanted = Wanted(out=Store(str(tmp_path / "out")))
    index_shards(tars[:3], wanted)
    for path in tars[:3]:  # to read one now would be an error
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    before = times(tmp_path / "out")
    shards = index_shards(tars, wanted)
    assert shards is not None
    assert len(shards) == 5
    assert before.items() < times(tmp_path / "out").items()
    (tmp_path / "out" / NAME).unlink()  # stopped before the end: each index is found by itself
    assert index_shards(tars, wanted) is not None
    assert before.items() < times(tmp_path / "out").items()


def test_a_changed_shard_is_indexed_again(tars: list[Path], tmp_path: Path) -> None:
    wanted = Wanted(out=Store(str(tmp_path / "out")))
    index_shards(tars, wanted)
    write_shard(tars[1], 7)
    index_shards(tars, wanted)
    assert open_shards(str(tmp_path / "out" / NAME)).shard_sizes == [1, 7, 3, 4, 5]


def test_a_joined_index_is_the_data_set_itself(tars: list[Path], tmp_path: Path) -> None:
    index_shards(tars[:2], Wanted(frozenset({"score"}), Store(str(tmp_path / "out"))))
    index_shards(tars[2:], Wanted(out=Store(str(tmp_path / "out"))))  # shards are added
    direct = open_shards(str(tmp_path / "in/*.tar"), fields=["score"])
    joined = open_shards(str(tmp_path / "out" / NAME))
    assert joined.fingerprint == direct.fingerprint
    assert joined.field("score").tolist() == direct.field("score").tolist()
    assert [joined.read(i) for i in range(15)] == [direct.read(i) for i in range(15)]


def test_opening_a_joined_index_looks_at_no_shard(tars: list[Path], tmp_path: Path) -> None:
    index_shards(tars, Wanted(out=Store(str(tmp_path / "out"))))
    known = open_shards(str(tmp_path / "out" / NAME)).fingerprint
    for path in [*tars, *(tmp_path / "out").glob("*.idx")]:
        path.unlink()
    assert open_shards(str(tmp_path / "out" / NAME)).fingerprint == known


def test_a_joined_index_tells_what_was_left_out_in_one_line(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "in/0.tar", 3)
    path.write_bytes(path.read_bytes().replace(GIF, b"NO PICTURE".ljust(len(GIF)), 2))
    index_shards([path], Wanted(out=Store(str(tmp_path / "out"))))
    for index in (tmp_path / "out").glob("*.idx"):
        index.unlink()
    lines: list[str] = []
    dataset = open_shards(str(tmp_path / "out" / NAME), log=lines.append)
    assert (len(dataset), dataset.rejects) == (1, {"image.format": 2})
    assert lines == [
        f"{tmp_path / 'out' / NAME}: 1 samples; left out: 2 image.format; vlm data check lists them"
    ]


def test_shards_and_their_joined_index_move_together(tars: list[Path], tmp_path: Path) -> None:
    index_shards(tars, Wanted(out=Store(str(tmp_path / "in"))))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    dataset = open_shards(str(tmp_path / "elsewhere" / NAME))
    assert dataset.read(14).captions == ("4 4",)


@pytest.mark.parametrize("place", [10, 200, 400, -2])
def test_a_damaged_joined_index_is_refused(tars: list[Path], tmp_path: Path, place: int) -> None:
    index_shards(tars, Wanted(out=Store(str(tmp_path / "out"))))
    path = tmp_path / "out" / NAME
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_shards(str(path))
    assert str(path) in str(caught.value)


def test_other_json_is_no_joined_index(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"name the shards\.json that vlm data index --out wrote"):
        open_shards(str(tmp_path / "a.json"))


def test_shards_of_one_name_are_refused(tars: list[Path], tmp_path: Path) -> None:
    other = write_shard(tmp_path / "other/1.tar")
    wanted = Wanted(out=Store(str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="have one name"):
        index_shards([*tars, other], wanted)
    index_shards(tars, wanted)
    with pytest.raises(ConfigError, match="have one name"):
        index_shards([other], wanted)


def test_a_field_that_older_shards_lack_names_them(tars: list[Path], tmp_path: Path) -> None:
    index_shards(tars[:2], Wanted(out=Store(str(tmp_path / "out"))))
    scored = Wanted(frozenset({"score"}), Store(str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=r"2 of its shards lack .*score.*: 0\.tar, 1\.tar"):
        index_shards(tars[2:], scored)
    index_shards(tars, scored)
    assert open_shards(str(tmp_path / "out" / NAME)).field("score").max() == 4


def test_all_shards_that_cannot_be_indexed_are_told(tars: list[Path]) -> None:
    for path in tars[1:3]:
        path.write_bytes(b"no tar")
    with pytest.raises(DataError) as caught:
        index_shards(tars, Wanted(), num_workers=2)
    assert len(caught.value.problems) == 2
    assert sorted(times(tars[0].parent)) == ["0.tar.idx", "3.tar.idx", "4.tar.idx"]


def test_indexes_go_to_any_url(tars: list[Path]) -> None:
    wanted = Wanted(out=Store("memory://bucket/set"))
    index_shards(tars[:3], wanted)
    index_shards(tars, wanted)
    memory = fsspec.filesystem("memory")
    names = sorted(name.rpartition("/")[2] for name in memory.ls("/bucket/set", detail=False))
    assert names == [*(f"{number}.tar.idx" for number in range(5)), NAME]
    header = json.loads(memory.cat_file(f"/bucket/set/{NAME}").partition(b"\n")[0])
    assert (header["num_shards"], header["num_samples"]) == (5, 15)


def test_a_url_of_no_known_kind_is_an_error_of_one_line(tars: list[Path]) -> None:
    with pytest.raises(ConfigError, match="nowhere://x: "):
        index_shards(tars, Wanted(out=Store("nowhere://x")))


def test_ranks_of_the_verb_finish_without_waiting(
    tars: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        words = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--field", "score"]
        assert main(["data", "index", *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == "rank 0 of 2: done; others are still at work\n"
    assert "5 shards" in said[1]
    assert open_shards(str(tmp_path / "out" / NAME)).field("score").sum() == 20


@pytest.mark.long
def test_the_verb_under_torchruns_environment(tars: list[Path], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vlm", "data", "index", str(tmp_path / "in"), "--out", "out"]
    ranks = [
        subprocess.Popen(
            [*words, "--field", "score"],
            cwd=tmp_path,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert any("5 shards" in text and "fingerprint" in text for text in said)
    assert open_shards(str(tmp_path / "out" / NAME)).field("score").sum() == 20


def test_the_verb_refuses_no_workers(tars: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", str(tars[0]), "--workers", "0"]) == 2
    assert capsys.readouterr().err == "error: --workers (0) must be at least 1\n"
