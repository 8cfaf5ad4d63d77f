"""The doctor: nothing that is wrong with a shard, its index or its pictures goes unsaid."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.cli.main import main
from vlm.curate.check import MAX_CASES, Case, Report, check
from vlm.curate.indexing import Wanted, index_shards
from vlm.curate.listing import Listing, Picture
from vlm.curate.pack import pack
from vlm.curate.store import Store
from vlm.data.dataset import open_shards
from vlm.data.shards import index_places

MakePicture = Callable[..., bytes]


@pytest.fixture
def shard(tmp_path: Path, make_picture: MakePicture) -> Path:
    """Four captioned pictures, the last one whole only in its header."""
    cut = make_picture("3.png", 3)[:-60]
    for number in range(4):
        make_picture(f"{number}.png", number)
    (tmp_path / "3.png").write_bytes(cut)
    pictures = [Picture(tmp_path / f"{n}.png", f"{n}.png", (f"caption {n}",)) for n in range(4)]
    pack(Listing("t", pictures), tmp_path / "set")
    (path,) = (tmp_path / "set").glob("*.tar")
    open_shards(str(path))
    return path


def flipped(path: Path, needle: bytes, at: int = 0) -> None:
    """Changes one bit of the shard; a disk that rots tells no new time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[content.index(needle) + at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))


def reasons(report: Report) -> dict[str, list[str]]:
    return {reason: [case.key for case in cases] for reason, cases in report.cases.items()}


def test_a_whole_set_is_clean(shard: Path) -> None:
    report = check([str(shard)])
    assert report.to_json() == {
        "num_shards": 1,
        "num_samples": 4,
        "size_bytes": shard.stat().st_size,
        "clean": True,
        "reasons": {},
    }


def test_one_bit_names_its_sample(shard: Path) -> None:
    key = open_shards(str(shard)).key(1)
    flipped(shard, b"caption 1")
    assert reasons(check([str(shard)])) == {"shard.crc": [key]}


@pytest.mark.parametrize("later", [0, 5_000_000_000])
def test_the_index_is_believed_before_the_tar(shard: Path, later: int) -> None:
    """Also where the change gave the tar a new time: opening it would index it again."""
    flipped(shard, b"caption 1")
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_mtime_ns + later, stat.st_mtime_ns + later))
    assert list(check([str(shard)]).counts) == ["shard.crc"]


def test_a_true_index_in_the_cache_is_believed_before_an_old_one_beside(shard: Path) -> None:
    beside = shard.with_name(f"{shard.name}.idx")
    old = beside.read_bytes()
    shard.write_bytes(shard.read_bytes().replace(b"caption 1", b"caption 9"))
    open_shards(str(shard))
    _, cached = index_places(shard, shard.stat(), None)
    cached.parent.mkdir(parents=True)
    beside.rename(cached)
    beside.write_bytes(old)
    assert check([str(shard)]).counts == {}


def test_a_bit_between_the_samples_is_told(shard: Path) -> None:
    flipped(shard, b"caption 1", at=300)  # in the padding after it
    assert reasons(check([str(shard)])) == {"shard.sha256": [""]}


def test_a_picture_that_does_not_decode_is_told_on_request(shard: Path) -> None:
    key = open_shards(str(shard)).key(3)
    report = check([str(shard)], decode=True)
    assert reasons(report) == {"image.truncated": [key]}
    assert str(report.cases["image.truncated"][0]).startswith(f"{shard.name}: {key}: OSError")


def test_a_cut_and_a_lost_shard_are_told(shard: Path, tmp_path: Path) -> None:
    wanted = Wanted(out=Store(str(tmp_path / "out")))
    index_shards([shard], wanted)
    joined = str(tmp_path / "out" / "shards.json")
    os.truncate(shard, 3000)
    assert list(check([joined]).counts) == ["shard.size"]
    assert list(check([str(shard)]).counts) == ["shard.size"]
    shard.unlink()
    assert list(check([joined]).counts) == ["shard.unreadable"]


def test_a_damaged_index_is_told(shard: Path, tmp_path: Path) -> None:
    index_shards([shard], Wanted(out=Store(str(tmp_path / "out"))))
    path = tmp_path / "out" / f"{shard.name}.idx"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert list(check([str(tmp_path / "out" / "shards.json")]).counts) == ["index.damaged"]


def test_what_indexing_left_out_is_told_with_its_key(shard: Path) -> None:
    key = open_shards(str(shard)).key(0)
    flipped(shard, b"\x89PNG")  # the first picture's; its index is gone too
    shard.with_name(f"{shard.name}.idx").unlink()
    report = check([str(shard)])
    assert reasons(report) == {"image.format": [key]}
    assert report.cases["image.format"][0].detail.startswith("at byte 512: ")


def test_a_report_counts_all_and_lists_some() -> None:
    report = Report()
    for number in range(3):
        other = Report(num_shards=1)
        other.add("image.empty", [Case(str(number), "", "")] * 50, 60)
        report.merge(other)
    assert (report.num_shards, report.counts) == (3, {"image.empty": 180})
    assert len(report.cases["image.empty"]) == MAX_CASES


def test_the_verb_ends_with_3_on_damage_and_0_without(
    shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(shard)]) == 0
    assert capsys.readouterr().out.endswith(" bytes read: nothing wrong\n")
    words = ["--decode", "--workers", "2", "--json", str(tmp_path / "report.json")]
    assert main(["data", "check", str(shard), *words]) == 3
    said = capsys.readouterr().out
    assert "image.truncated" in said
    assert said.endswith(" bytes read and decoded: 1 problem\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["clean"], report["decoded"]) == (False, True)
    (case,) = report["reasons"]["image.truncated"]["cases"]
    assert case["shard"] == shard.name
