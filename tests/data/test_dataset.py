"""Indexed shards: patterns, index files, random access, and all that can be wrong with a sample."""

import io
import json
import multiprocessing
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.data.dataset import Dataset, open_shards
from vlm.data.decode import FORMATS
from vlm.data.index_file import MAX_QUARANTINE, VERSION
from vlm.data.patterns import MAX_EXPANSION, expand
from vlm.data.samples import BadSample, Sample, parse_texts
from vlm.data.shards import open_index
from vlm.errors import ConfigError, DataError

EMOJI = Path(__file__).parents[2] / "datasets" / "emoji"
MakeShard = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def gif(red: int) -> bytes:
    """A whole picture of one pixel."""
    head = b"GIF89a\x01\0\x01\0\x80\0\0" + bytes([red, 0, 0, 0, 0, 0])
    return head + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"


A, B, C = map(gif, range(3))


def silent(line: str) -> None:
    pytest.fail(f"nothing to tell, but: {line}")


def opened(*paths: Path, **options: Any) -> Dataset:
    return open_shards([str(path) for path in paths], log=silent, **options)


# --- reading ---


def test_a_sample_has_its_image_captions_and_meta(make_shard: MakeShard) -> None:
    meta = {"captions": ["one", "two"], "label": "cat", "tags": [1, None]}
    path = make_shard(
        [
            ("a", {"jpg": A, "json": json.dumps(meta).encode()}),
            ("b", {"webp": B, "txt": b" words \n"}),
            ("c", {"gif": C, "cls": b"7"}),
        ]
    )
    dataset = opened(path)
    assert [dataset.read(i) for i in range(3)] == [
        Sample("a", A, ("one", "two"), {"label": "cat", "tags": [1, None]}),
        Sample("b", B, ("words",), {}),
        Sample("c", C, (), {"cls": 7}),
    ]
    assert [dataset.key(i) for i in range(3)] == ["a", "b", "c"]
    assert [dataset.image_suffix(i) for i in range(3)] == ["jpg", "webp", "gif"]
    assert list(dataset.captions()) == ["one", "two", "words"]
    assert list(dataset.metas()) == [dataset.read(i).meta for i in range(3)]


def test_sample_ids_run_through_the_shards_in_order_of_their_names(make_shard: MakeShard) -> None:
    second = make_shard([("a", {"jpg": gif(2)}), ("b", {"jpg": gif(3)})], name="b.tar")
    first = make_shard([("a", {"jpg": gif(0)}), ("b", {"jpg": gif(1)})], name="a.tar")
    dataset = opened(second, first)
    assert [dataset.read(np.int64(i)).image for i in range(4)] == [gif(i) for i in range(4)]
    assert dataset.shard_sizes == [2, 2]
    assert len(dataset) == dataset.num_samples == 4


def test_ids_outside_the_data_set_are_an_error(make_shard: MakeShard) -> None:
    dataset = opened(make_shard(2))
    for sample_id in (-1, 2):
        with pytest.raises(IndexError):
            dataset.read(sample_id)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "gif"])
def test_with_two_images_the_first_of_the_list_is_taken(make_shard: MakeShard, suffix: str) -> None:
    order = ["jpg", "jpeg", "png", "webp", "gif"]
    kept = {name: gif(order.index(name)) for name in reversed(order[order.index(suffix) :])}
    assert opened(make_shard([("a", kept)])).read(0).image == gif(order.index(suffix))


# --- splits and selections ---


def test_a_selection_renumbers_its_samples(make_shard: MakeShard) -> None:
    dataset = opened(make_shard(3, name="a.tar"), make_shard(3, name="b.tar"))
    chosen = dataset.select(np.array([False, True, True, False, False, True]))
    assert chosen.shard_sizes == [2, 1]
    assert [chosen.key(i) for i in range(3)] == ["s1", "s2", "s2"]
    again = chosen.select(np.array([True, False, True]))
    assert [again.read(i).captions for i in range(2)] == [("caption 1",), ("caption 2",)]
    assert list(again.captions()) == ["caption 1", "caption 2"]


def test_a_split_has_every_sample_once_and_equal_pictures_on_one_side(
    make_shard: MakeShard,
) -> None:
    samples = [(f"s{i}", {"jpg": gif(i % 20), "txt": b"x"}) for i in range(60)]
    dataset = opened(make_shard(samples))
    train, val = dataset.split(0.3)
    images = [{part.read(i).image for i in range(len(part))} for part in (train, val)]
    assert len(train) + len(val) == 60
    assert len(images[0]) + len(images[1]) == 20
    assert len(images[1]) > 2


def test_a_split_holds_its_fraction_and_grows_with_it() -> None:
    dataset = open_shards(str(EMOJI / "train-*.tar"), log=silent)
    keys = []
    for fraction in (0.05, 0.1, 0.3):
        _, val = dataset.split(fraction)
        assert abs(len(val) / len(dataset) - fraction) < 0.02
        keys.append({val.key(i) for i in range(len(val))})
    assert keys[0] < keys[1] < keys[2]


def test_no_fraction_takes_nothing(make_shard: MakeShard) -> None:
    dataset = opened(make_shard(3))
    train, val = dataset.split(0.0)
    assert (len(train), len(val)) == (3, 0)
    assert train.fingerprint == dataset.fingerprint
    with pytest.raises(ConfigError, match="must be at least 0 and below 1"):
        dataset.split(1.0)


# --- fingerprint and pickling ---


def test_the_fingerprint_is_of_contents_and_selection_not_of_the_place(
    make_shard: MakeShard, tmp_path: Path
) -> None:
    path = make_shard(3, name="a.tar")
    known = opened(path).fingerprint
    moved = tmp_path / "elsewhere" / "a.tar"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert opened(moved).fingerprint == known
    assert opened(moved).select(np.array([True, True, False])).fingerprint != known
    assert opened(moved).select(np.array([True, True, True])).fingerprint == known
    assert opened(make_shard(4, name="a.tar")).fingerprint != known
    assert opened(make_shard(3, name="b.tar")).fingerprint != known


def _read_in_child(dataset: Dataset, results: Any) -> None:
    results.put([dataset.read(i).captions for i in range(len(dataset))])


def test_a_pickle_is_small_and_reads_in_a_spawned_process(make_shard: MakeShard) -> None:
    dataset = opened(make_shard(50)).select(np.arange(50) % 2 == 0)
    dataset.read(0)  # holds an open file now
    assert len(pickle.dumps(dataset)) < 2000
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(dataset, results))
    child.start()
    captions = results.get()
    child.join()
    assert captions == [(f"caption {i}",) for i in range(0, 50, 2)]


def test_no_more_than_64_shards_are_open_at_once(make_shard: MakeShard) -> None:
    paths = [make_shard([("a", {"jpg": A})], name=f"{i:03d}.tar") for i in range(70)]
    dataset = opened(*paths)
    before = len(os.listdir("/proc/self/fd"))
    for sample_id in range(70):
        dataset.read(sample_id)
    assert 120 <= len(os.listdir("/proc/self/fd")) - before <= 128  # the tars and their indexes
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


# --- damage after indexing ---


def test_bytes_that_changed_since_are_a_bad_sample(make_shard: MakeShard) -> None:
    path = make_shard(2)
    dataset = opened(path)
    content = bytearray(path.read_bytes())
    content[520] ^= 1  # in the first sample's image
    path.write_bytes(content)
    with pytest.raises(BadSample, match=r"'s0'.* are not as indexed") as caught:
        dataset.read(0)
    assert caught.value.reason == "shard.crc"
    assert dataset.read(1).captions == ("caption 1",)


def test_a_shard_cut_since_is_a_bad_sample(make_shard: MakeShard) -> None:
    path = make_shard(2)
    dataset = opened(path)
    os.truncate(path, 2000)
    with pytest.raises(BadSample, match=r"shard\.size: .*'s1': has 2000 bytes; indexed were"):
        dataset.read(1)


def test_a_shard_that_is_gone_is_a_bad_sample(make_shard: MakeShard) -> None:
    path = make_shard(2)
    dataset = opened(path)
    path.unlink()
    with pytest.raises(BadSample, match=r"shard\.unreadable.*No such file"):
        dataset.read(0)


def test_a_bad_sample_survives_pickling() -> None:
    bad = pickle.loads(pickle.dumps(BadSample("text.json", "why")))  # noqa: S301  # our own bytes
    assert (bad.reason, bad.detail, str(bad)) == ("text.json", "why", "text.json: why")


# --- texts ---


@pytest.mark.parametrize(
    ("fields", "captions", "meta"),
    [
        ({"json_text": b'{"captions": ["a", " ", "b "], "caption": "c"}'}, ("a", "b"), {}),
        ({"json_text": b'{"captions": [], "caption": "c"}', "txt": b"t"}, ("c",), {}),
        ({"json_text": b'{"caption": null, "x": 1}', "txt": b"t"}, ("t",), {"x": 1}),
        ({"json_text": b'\xef\xbb\xbf{"caption": "c"}'}, ("c",), {}),
        ({"json_text": b'{"caption": "\\ud83d\\ude00"}'}, ("😀",), {}),
        ({"txt": b"\xef\xbb\xbft\r\n"}, ("t",), {}),
        ({"txt": " \u3000\n".encode()}, (), {}),
        ({"cls": b"12\n"}, (), {"cls": 12}),
        ({"cls": b"012"}, (), {"cls": "012"}),
        ({"cls": b"tabby cat"}, (), {"cls": "tabby cat"}),
        ({"json_text": b'{"cls": 1}', "cls": b"2"}, (), {"cls": 2}),
        ({}, (), {}),
    ],
)
def test_captions_and_meta_of_text_fields(
    fields: dict[str, bytes], captions: tuple[str, ...], meta: dict[str, Any]
) -> None:
    assert parse_texts(**fields) == (captions, meta)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"txt": "schön".encode("latin-1")}, "text.encoding"),
        ({"txt": "a".encode("utf-16")}, "text.encoding"),
        ({"json": b'{"caption": "\xff"}'}, "text.encoding"),
        ({"json": b'{"x": "\\ud800"}'}, "text.encoding"),
        ({"json": b"[" * 100_000}, "text.json"),
        ({"json": b'{"x": ' + b"9" * 5000 + b"}"}, "text.json"),
        ({"json": b'{"x": NaN}'}, "text.json"),
        ({"json": b'{"x": 1e999}'}, "text.json"),
        ({"json": b'["caption"]'}, "text.json"),
        ({"json": b'{"caption": '}, "text.json"),
        ({"json": b'{"caption": 3}'}, "text.json"),
        ({"json": b'{"captions": "a"}'}, "text.json"),
        ({"json": b'{"captions": ["a", 3]}'}, "text.json"),
        ({"json": b'{"caption": "' + b"x" * (1 << 20) + b'"}'}, "text.json"),
        ({"txt": b"x" * ((1 << 20) + 1)}, "text.size"),
    ],
)
def test_texts_that_leave_a_sample_out(
    make_shard: MakeShard, fields: dict[str, bytes], reason: str
) -> None:
    path = make_shard([("bad", {"jpg": A, **fields}), ("ok", {"jpg": B, "txt": b"t"})])
    dataset = open_shards(str(path), log=lambda line: None)
    assert [dataset.read(i).captions for i in range(len(dataset))] == [("t",)]
    assert dataset.rejects == {reason: 1}


def test_a_sample_whose_bytes_changed_has_no_text(make_shard: MakeShard) -> None:
    path = make_shard([("a", {"jpg": A, "txt": b"here"}), ("b", {"jpg": B, "txt": b"t"})])
    dataset = opened(path)
    path.write_bytes(path.read_bytes().replace(b"here", b"gone"))
    assert list(dataset.captions()) == ["t"]
    assert list(dataset.metas()) == [{}, {}]


# --- what the index tells without reading ---


def test_the_index_tells_sizes_formats_and_lengths(make_shard: MakeShard) -> None:
    wide = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (30, 20)).save(wide, "JPEG", exif=exif)
    captions = json.dumps({"captions": ["four", "twelve chars", "x"]}).encode()
    first = make_shard([("a", {"png": wide.getvalue(), "json": captions})], name="a.tar")
    rest = make_shard([("b", {"jpg": A}), ("c", {"jpg": B, "txt": b"\xc3\xa9"})], name="b.tar")
    dataset = opened(first, rest)
    assert dataset.image_sizes().tolist() == [[20, 30], [1, 1], [1, 1]]
    assert dataset.image_sizes().dtype == dataset.caption_lengths().dtype == np.int32
    assert dataset.caption_lengths().tolist() == [12, 0, 1]
    assert [FORMATS[number] for number in dataset.image_formats()] == ["JPEG", "GIF", "GIF"]
    chosen = dataset.select(np.array([True, False, True]))
    assert chosen.caption_lengths().tolist() == [12, 1]
    assert dataset.select(np.zeros(3, bool)).image_sizes().shape == (0, 2)


def test_a_field_is_the_number_in_each_samples_meta(make_shard: MakeShard) -> None:
    values = [b"0.5", b"3", b"true", b'"9"', b"null", b"[1]", b"9" * 400]
    samples = [
        (f"s{i}", {"jpg": A, "json": b'{"score": %s}' % value}) for i, value in enumerate(values)
    ]
    path = make_shard([*samples, ("bare", {"jpg": A, "cls": b"4"})])
    dataset = opened(path, fields=["score", "cls"])
    nan = [float("nan")]
    assert np.array_equal(dataset.field("score"), [0.5, 3, 1, *nan * 5], equal_nan=True)
    assert np.array_equal(dataset.field("cls"), [*nan * 7, 4], equal_nan=True)
    assert dataset.select(np.arange(8) == 1).field("score").tolist() == [3]


def test_an_index_is_built_again_for_a_further_field_and_keeps_the_others(
    make_shard: MakeShard,
) -> None:
    path = make_shard([("a", {"jpg": A, "json": b'{"x": 1, "y": 2}'})])
    assert opened(path, fields=["x"]).field("x").tolist() == [1]
    with pytest.raises(DataError) as caught:
        opened(path).field("y")
    assert str(caught.value) == (
        'train-0000.tar: "y" was not indexed; run vlm data index with --field y'
    )
    dataset = opened(path, fields=["y"])
    assert (dataset.field("x").tolist(), dataset.field("y").tolist()) == ([1], [2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image.empty"),
        (b"no picture", "image.format"),
        (b"\x89PNG\r\n\x1a\n", "image.truncated"),
        (A[:6] + b"\xff\xff\xff\xff" + A[10:], "image.too_large"),
    ],
)
def test_a_picture_without_a_good_header_is_left_out_and_remembered(
    make_shard: MakeShard, data: bytes, reason: str
) -> None:
    path = make_shard([("good", {"jpg": A}), ("bad", {"jpg": data, "txt": b"t"})])
    lines: list[str] = []
    dataset = open_shards(str(path), log=lines.append)
    assert [dataset.key(i) for i in range(len(dataset))] == ["good"]
    assert dataset.rejects == {reason: 1}
    (case,) = dataset.shards[0].details().quarantine
    assert (case.reason, case.key, case.offset) == (reason, "bad", 1536)
    assert f"{reason} at byte 1536: 'bad': " in lines[0]


def test_the_quarantine_is_bounded_and_the_counts_are_not(make_shard: MakeShard) -> None:
    bad = [(f"bad{i:04}", {"jpg": b""}) for i in range(MAX_QUARANTINE + 5)]
    path = make_shard([("good", {"jpg": A}), *bad])
    dataset = open_shards(str(path), log=lambda line: None)
    assert dataset.rejects == {"image.empty": MAX_QUARANTINE + 5}
    assert len(dataset.shards[0].details().quarantine) == MAX_QUARANTINE


# --- index files ---


def test_an_index_is_written_once_and_found_again(make_shard: MakeShard) -> None:
    path = make_shard(3)
    opened(path)
    index = path.with_name("train-0000.tar.idx")
    written = index.stat().st_mtime_ns
    opened(path)
    assert index.stat().st_mtime_ns == written
    header = json.loads(index.read_bytes().partition(b"\n")[0])
    assert header["format"] == "vlm-shard-index"
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, index.name]


def test_a_changed_tar_is_indexed_again(make_shard: MakeShard) -> None:
    path = make_shard(3)
    opened(path)
    make_shard(5)
    assert len(opened(path)) == 5
    os.utime(path, ns=(0, 0))
    assert open_index(path).mtime_ns == 0


def test_an_index_of_an_older_version_is_built_again(make_shard: MakeShard) -> None:
    path = make_shard(3)
    opened(path)
    index = path.with_name("train-0000.tar.idx")
    now = f'"version": {VERSION}'.encode()
    old = index.read_bytes()[:-4].replace(now, b'"version": 2')
    assert now not in old
    index.write_bytes(old + zlib.crc32(old).to_bytes(4, "little"))
    assert len(opened(path)) == 3
    assert json.loads(index.read_bytes().partition(b"\n")[0])["version"] == VERSION


def test_a_damage_of_the_index_in_use_is_told_before_its_numbers_are_used(
    make_shard: MakeShard,
) -> None:
    path = make_shard(3)
    dataset = opened(path)
    index = path.with_name("train-0000.tar.idx")
    content = bytearray(index.read_bytes())
    content[-200] ^= 1
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"train-0000\.tar\.idx: the index is damaged"):
        dataset.image_sizes()


@pytest.mark.parametrize("place", [3, 20, 100, -1, -5, -200])
def test_a_damaged_index_is_built_again(make_shard: MakeShard, place: int) -> None:
    path = make_shard(3)
    opened(path)
    index = path.with_name("train-0000.tar.idx")
    content = bytearray(index.read_bytes())
    content[place] ^= 1
    index.write_bytes(content)
    dataset = opened(path)
    assert [dataset.read(i).captions for i in range(3)] == [(f"caption {i}",) for i in range(3)]


@pytest.mark.parametrize("size", [0, 1, 100, 700])
def test_a_cut_index_is_built_again(make_shard: MakeShard, tmp_path: Path, size: int) -> None:
    path = make_shard(3)
    opened(path)
    os.truncate(path.with_name("train-0000.tar.idx"), size)
    assert len(opened(path, cache_dir=tmp_path / "cache")) == 3


def test_an_index_goes_to_the_cache_where_it_cannot_lie_beside_its_tar(
    make_shard: MakeShard, tmp_path: Path
) -> None:
    path = make_shard(3, name="x" * 250 + ".tar")  # its index's name would be too long
    cache = tmp_path / "cache"
    assert len(opened(path, cache_dir=cache)) == 3
    (index,) = (cache / "index").iterdir()
    written = index.stat().st_mtime_ns
    assert len(opened(path, cache_dir=cache)) == 3
    assert index.stat().st_mtime_ns == written


def test_another_programs_index_is_left_alone(make_shard: MakeShard, tmp_path: Path) -> None:
    path = make_shard(3)
    other = path.with_name("train-0000.tar.idx")
    other.write_bytes(b"\0\0\0\0\0\0\0\0of another program")
    assert len(opened(path, cache_dir=tmp_path / "cache")) == 3
    assert other.read_bytes() == b"\0\0\0\0\0\0\0\0of another program"


# --- what opening tells ---


def test_a_shard_without_images_is_an_error_that_names_its_fields(make_shard: MakeShard) -> None:
    path = make_shard([("a", {"txt": b"x", "bin": b"x"}), ("b", {"bin": b"x"})])
    other = make_shard([("a", {"npy": b"x"})], name="train-0001.tar")
    with pytest.raises(DataError) as caught:
        opened(path, other)
    what = "no sample has an image field (jpg, jpeg, png, webp, gif); its fields are"
    assert caught.value.problems == [
        f"train-0000.tar: {what}: bin, txt",
        f"train-0001.tar: {what}: npy",
    ]


def test_captions_are_required_only_on_request(make_shard: MakeShard) -> None:
    path = make_shard([("a", {"jpg": A, "cls": b"1"})])
    assert opened(path).read(0).captions == ()
    with pytest.raises(DataError) as caught:
        opened(path, require_captions=True)
    assert str(caught.value) == (
        'train-0000.tar: no sample has a caption (txt, or json with "captions" or "caption"); '
        "the fields are: cls, jpg"
    )


def test_a_damaged_shard_is_told_and_read(make_shard: MakeShard) -> None:
    path = make_shard(4)
    os.truncate(path, 3 * 2048)
    lines: list[str] = []
    dataset = open_shards(str(path), log=lines.append)
    assert len(dataset) == 3
    assert dataset.rejects == {"shard.truncated": 1}
    assert lines == [
        "train-0000.tar: 3 samples; left out: 1 shard.truncated; first: shard.truncated "
        "at byte 6144: the file ends without an end-of-archive marker"
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "shard.empty at byte 0: the file has no bytes"),
        (bytes(1024), "shard.empty at byte 0: it has no members"),
        (
            b"<html>" * 100,
            "shard.header at byte 0: not a tar header: a number in it is not octal; "
            "no member after it",
        ),
    ],
)
def test_a_file_that_is_no_shard_is_an_error_and_gets_no_index(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        opened(path)
    assert str(caught.value) == f"a.tar: holds no samples: {problem}"
    assert list(tmp_path.iterdir()) == [path]


def test_the_shipped_emoji_shards_are_whole() -> None:
    dataset = open_shards(str(EMOJI / "*.tar"), require_captions=True, log=silent)
    assert dataset.rejects == {}
    assert len(dataset) > 4000
    assert dataset.read(len(dataset) - 1).captions


# --- patterns ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("train-0000.tar", "train-0001.tar", "train-0003.tar", "val.tar", "train.csv"):
        Path("data", name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("data/train-*.tar", ["train-0000.tar", "train-0001.tar", "train-0003.tar"]),
        ("data/train-{0000..0001}.tar", ["train-0000.tar", "train-0001.tar"]),
        ("data/{val,train-0003}.tar", ["train-0003.tar", "val.tar"]),
        ("data/{val,train-000{0,3}}.tar", ["train-0000.tar", "train-0003.tar", "val.tar"]),
        (
            "data/{val,train-*}.tar",
            ["train-0000.tar", "train-0001.tar", "train-0003.tar", "val.tar"],
        ),
        (["data/val.tar", "data/v*.tar", "./data/val.tar"], ["val.tar"]),
        ("**/val.tar", ["val.tar"]),
        ("data/*", ["train-0000.tar", "train-0001.tar", "train-0003.tar", "val.tar"]),
    ],
)
def test_patterns_name_shards(folder: Path, pattern: str | list[str], names: list[str]) -> None:
    assert [Path(path).name for path in expand(pattern)] == names


def test_one_shard_named_in_several_ways_is_read_once(folder: Path) -> None:
    Path("link").symlink_to("data")
    names = ["data/val.tar", str(folder / "data/val.tar"), "link/v*.tar", "data/../data/val.tar"]
    assert len(expand(names)) == 1


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (
            "data/trian-*.tar",
            'no shard matches "data/trian-*.tar"; the folder data holds '
            "train-0003.tar, train-0001.tar, train-0000.tar",
        ),
        (
            "photos/*.jpg",
            'no shard matches "photos/*.jpg"; a folder of pictures is given as the folder: photos/',
        ),
        ("photos/reb.jpg", 'no shard matches "photos/reb.jpg"; the folder photos holds red.jpg'),
        ("data/val.tra", 'no shard matches "data/val.tra"; the folder data holds val.tar'),
        ("nowhere/*.tar", 'no shard matches "nowhere/*.tar"; there is no folder nowhere'),
        (
            "data/train-{0000..0004}.tar",
            '"data/train-{0000..0004}.tar": 2 of its shards are missing: '
            "data/train-0002.tar, data/train-0004.tar",
        ),
    ],
)
def test_what_is_not_there_is_named(folder: Path, pattern: str, problem: str) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/red.jpg").touch()
    (folder / "data/val.tar.phash").touch()
    with pytest.raises(DataError) as caught:
        expand(pattern)
    assert str(caught.value) == problem


def test_all_patterns_that_match_nothing_are_told_at_once(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        expand(["a/*.tar", "data/val.tar", "b/*.tar"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:cat x.tar",
        "pipe://cat x.tar",
        "PIPE:id",
        "file:x.tar",
        "http:x.tar",
        "shell://id",
        "simplecache::s3://b/{0..3}.tar",
    ],
)
def test_commands_and_unknown_schemes_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(pattern)
    assert str(caught.value) == (
        f'"{pattern}": shards are files, https:// or what fsspec knows (s3://, gs://); no commands'
    )


def test_standard_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="random access"):
        expand("-")


@pytest.mark.parametrize(
    "pattern", ["x{0..9999999999}.tar", "{0..999}{0..999}.tar", "{0..99999}{0..99999}{0..99999}"]
)
def test_a_bomb_of_braces_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(pattern)
    assert str(caught.value) == f'"{pattern}": names more than {MAX_EXPANSION} shards'


@pytest.mark.parametrize(
    "pattern", [";id", "$(touch x).tar", "${HOME}/x.tar", "@x", "`id`.tar", "{", "{}"]
)
def test_no_pattern_is_a_command(folder: Path, pattern: str) -> None:
    with pytest.raises(DataError, match="no shard matches"):
        expand(pattern)
    assert not Path("x").exists()
