"""The header scan against WebDataset's own reader, and against damage."""

import gzip
import io
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from vlm.data.grouping import TarSample, samples, split_key
from vlm.data.tar import Member, Problem, scan
from vlm.errors import DataError

FORMATS = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)


def scanned(path: Path) -> list[Member | Problem]:
    with path.open("rb") as file:
        return list(scan(file.fileno(), name=path.name))


def read(path: Path) -> tuple[dict[str, dict[str, bytes]], list[Problem]]:
    """Every sample's fields by key, and the problems."""
    content = path.read_bytes()
    kept, problems, _ = samples(scanned(path))
    return {sample.key: _fields(sample, content) for sample in kept}, problems


def _fields(sample: TarSample, content: bytes) -> dict[str, bytes]:
    return {
        suffix: content[member.offset : member.offset + member.size]
        for suffix, member in sample.fields.items()
    }


def write(
    path: Path,
    members: Sequence[tuple[str | tarfile.TarInfo, bytes]],
    form: int = tarfile.USTAR_FORMAT,
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def webdataset_reads(path: Path) -> list[dict[str, bytes]]:
    with path.open("rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


# --- healthy tars ---


@pytest.mark.parametrize("form", FORMATS)
def test_random_healthy_tars_read_as_webdataset_reads_them(tmp_path: Path, form: int) -> None:
    for seed in range(12):
        path = write(tmp_path / f"{seed}.tar", _random_members(random.Random(seed), form), form)
        ours, problems = read(path)
        theirs = webdataset_reads(path)
        assert problems == []
        assert len(ours) == len(theirs) > 0
        for sample in theirs:
            known = {name: data for name, data in sample.items() if name in {"jpg", "txt", "json"}}
            assert ours[sample["__key__"]] == known


def _random_members(rng: random.Random, form: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(rng.randint(1, 12)):
        folder = rng.choice(["", "./", "a/", "a.b/c/", "früh/", "長い/"])
        long = 0 if form == tarfile.USTAR_FORMAT else rng.choice([0, 0, 90, 200, 900])
        key = f"{folder}{number:03d}{'x' * long}"
        suffixes = ["JPG" if rng.random() < 0.2 else "jpg", "txt", "json", "npy", "seg.png"]
        chosen = suffixes[:1] + rng.sample(suffixes[1:], rng.randint(0, 4))
        members += [
            (f"{key}.{suffix}", rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])))
            for suffix in chosen
        ]
        if rng.random() < 0.2:
            members.append(
                (rng.choice(["README", "__meta__", "__index__/x.json"]), b"not a sample")
            )
    return members


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.b.JPG", ("a", "b.jpg")),
        ("x.y/a.jpg", ("x.y/a", "jpg")),
        ("./a.txt", ("./a", "txt")),
        ("README", None),
        ("x.y/README", None),
    ],
)
def test_keys_end_at_the_first_dot_of_the_last_component(
    name: str, expected: tuple[str, str] | None
) -> None:
    assert split_key(name) == expected


def test_a_folder_entry_is_no_problem(tmp_path: Path) -> None:
    folder = special("folder", tarfile.DIRTYPE)
    path = write(
        tmp_path / "a.tar", [("folder/a.jpg", b"1"), (folder, b""), ("folder/b.jpg", b"2")]
    )
    assert read(path) == ({"folder/a": {"jpg": b"1"}, "folder/b": {"jpg": b"2"}}, [])


def test_a_global_pax_header_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    said = {"comment": "a commit", "path": "another.jpg"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=said) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"A"))
    assert read(path) == ({"a": {"jpg": b"A"}}, [])


def test_a_file_over_eight_gibibytes_is_read_to_its_last_byte(tmp_path: Path) -> None:
    """A sparse file of 9 GiB: its size needs GNU's binary number, or a pax record."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.jpg")
        info.size = 9 << 30
        head = info.tobuf(form)
        path = tmp_path / "big.tar"
        path.write_bytes(head)
        os.truncate(path, len(head) + info.size)
        small = write(tmp_path / "small.tar", [("z.jpg", b"Z")])
        with path.open("ab") as file:
            file.write(small.read_bytes())
        big, z = scanned(path)
        assert big == Member("big.jpg", len(head), 9 << 30)
        assert z == Member("z.jpg", len(head) + (9 << 30) + 512, 1)


# --- damage ---

Harm = Callable[[bytearray, int], bytearray]
KEYS = [f"s{number}" for number in range(6)]


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """Six samples of three fields whose contents name their sample; data of one to three blocks."""
    return write(
        tmp_path / "train-0000.tar",
        [
            (f"{key}.{suffix}", f"{key} {suffix} ".encode() * (40 * number + 1))
            for number, key in enumerate(KEYS)
            for suffix in ("jpg", "json", "txt")
        ],
    )


def flip(content: bytearray, at: int) -> bytearray:
    content[at + 5] ^= 0x10
    return content


def zero(content: bytearray, at: int) -> bytearray:
    content[at : at + 512] = bytes(512)
    return content


def zero_page(content: bytearray, at: int) -> bytearray:
    content[at : at + 1024] = bytes(1024)
    return content


def negative_size(content: bytearray, at: int) -> bytearray:
    return _with_size(content, at, b"\xff" * 12)


def eight_exbibytes(content: bytearray, at: int) -> bytearray:
    return _with_size(content, at, b"\x80\0\0\0" + (1 << 63).to_bytes(8, "big"))


def _with_size(content: bytearray, at: int, size: bytes) -> bytearray:
    content[at + 124 : at + 136] = size
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return content


@pytest.mark.parametrize("harm", [flip, zero, zero_page, negative_size, eight_exbibytes])
def test_a_damaged_header_costs_its_own_sample_only(healthy: Path, harm: Harm) -> None:
    whole, _ = read(healthy)
    content = healthy.read_bytes()
    for member in scanned(healthy):
        assert isinstance(member, Member)
        healthy.write_bytes(harm(bytearray(content), member.offset - 512))
        found, problems = read(healthy)
        damaged, _ = split_key(member.name) or ("", "")
        assert {key: whole[key] for key in KEYS if key != damaged} == found
        assert 0 <= problems[0].offset - (member.offset - 512) <= 1024
        assert problems[0].reason.startswith("shard.")


@pytest.mark.parametrize(
    ("place", "reason"), [(0, "no end"), (300, "inside a header"), (514, "lacks")]
)
def test_a_cut_shard_keeps_every_sample_before_the_cut(
    healthy: Path, place: int, reason: str
) -> None:
    whole, _ = read(healthy)
    content = healthy.read_bytes()
    members = [item for item in scanned(healthy) if isinstance(item, Member)]
    for number, member in enumerate(members):
        if number == 0 and place == 0:
            continue
        healthy.write_bytes(content[: member.offset - 512 + place])
        found, problems = read(healthy)
        complete = KEYS[: number // 3]
        for key in complete:
            assert found[key] == whole[key]
        assert problems[0].reason == "shard.truncated"
        if number > 3:  # there are whole samples to compare with
            assert list(found) == complete


def test_the_reason_of_a_cut_says_where(healthy: Path) -> None:
    content = healthy.read_bytes()
    member = scanned(healthy)[7]
    assert isinstance(member, Member)
    details = []
    for place in (0, 300, 514):
        healthy.write_bytes(content[: member.offset - 512 + place])
        _, problems = read(healthy)
        details.append((problems[0].offset, problems[0].detail))
    start = member.offset - 512
    assert details == [
        (start, "the file ends without an end-of-archive marker"),
        (start, "the file ends inside a header; no member after it"),
        (start, f"'s2.json' lacks its last {member.size - 2} bytes; no member after it"),
    ]


def test_no_field_is_paired_across_a_damage(tmp_path: Path) -> None:
    """Header of the first sample's caption gone and the second sample has the same key."""
    path = write(
        tmp_path / "a.tar",
        [("a.jpg", b"A"), ("a.txt", b"of A"), ("b.jpg", b"B"), ("a.txt", b"of another")],
    )
    content = bytearray(path.read_bytes())
    path.write_bytes(flip(content, 1024))
    found, problems = read(path)
    assert "a" not in found
    assert [problem.reason for problem in problems] == [
        "shard.header",
        "sample.damaged",
        "sample.repeated_key",
    ]


def test_equal_keys_on_both_sides_of_a_damage_are_not_one_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"A"), ("b.jpg", b"B"), ("a.txt", b"of another")])
    path.write_bytes(flip(bytearray(path.read_bytes()), 1024))
    found, problems = read(path)
    assert found == {}
    reasons = [problem.reason for problem in problems]
    assert reasons == ["shard.header", "sample.damaged", "sample.damaged"]


def test_damaged_headers_at_random_never_pair_fields_of_two_samples(healthy: Path) -> None:
    content = healthy.read_bytes()
    headers = [item.offset - 512 for item in scanned(healthy) if isinstance(item, Member)]
    rng = random.Random(0)
    for _ in range(60):
        mutated = bytearray(content)
        for at in rng.sample(headers, rng.randint(1, 5)):
            rng.choice([flip, zero, eight_exbibytes])(mutated, at)
        if rng.random() < 0.3:
            del mutated[rng.randrange(len(mutated)) :]
        healthy.write_bytes(mutated)
        found, problems = read(healthy)
        assert problems
        for key, fields in found.items():
            for suffix, data in fields.items():
                assert data.startswith(f"{key} {suffix} ".encode())


def test_trailing_garbage_is_told(healthy: Path) -> None:
    size = healthy.stat().st_size
    with healthy.open("ab") as file:
        file.write(b"garbage")
    found, problems = read(healthy)
    assert list(found) == KEYS
    assert problems == [
        Problem(
            "shard.trailing", size, "7 bytes after the end-of-archive marker, none of them a member"
        )
    ]


def test_a_tar_appended_to_a_tar_is_read_and_told(healthy: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more.tar", [("z.jpg", b"Z"), ("z.json", b"{}"), ("z.txt", b"Z")])
    healthy.write_bytes(healthy.read_bytes() + more.read_bytes())
    found, problems = read(healthy)
    assert list(found) == [*KEYS, "z"]
    assert [problem.reason for problem in problems] == ["shard.zeroed"]


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.touch()
    assert scanned(path) == [Problem("shard.empty", 0, "the file has no bytes")]


def test_a_page_of_html_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html><body>404 Not Found</body></html>" * 30)
    assert [item.reason for item in scanned(path) if isinstance(item, Problem)] == ["shard.header"]


def test_compressed_tars_are_refused(healthy: Path) -> None:
    path = healthy.with_name("train-0000.tar.gz")
    path.write_bytes(gzip.compress(healthy.read_bytes()))
    with pytest.raises(DataError) as caught:
        scanned(path)
    assert str(caught.value) == (
        "train-0000.tar.gz: is compressed with gzip, but samples are read by random access; "
        "unpack it first (gunzip)"
    )


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.FIFOTYPE, "FIFO"),
    ],
)
def test_links_and_devices_are_never_followed(tmp_path: Path, kind: bytes, word: str) -> None:
    path = write(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"A"),
            ("a.txt", b"of A"),
            ("b.jpg", b"B"),
            (special("b.txt", kind, "/etc/passwd"), b""),
            ("c.jpg", b"C"),
            ("c.txt", b"of C"),
        ],
    )
    found, problems = read(path)
    assert list(found) == ["a", "c"]
    assert problems[0].reason == "member.type"
    assert problems[0].detail == f"'b.txt': a {word}"


@pytest.mark.parametrize("name", ["/abs/a.jpg", "../a.jpg", "x/../../a.jpg", "a\nb.jpg"])
def test_names_that_leave_the_folder_or_hide_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.tar", [(name, b"A"), ("b.jpg", b"B")])
    found, problems = read(path)
    assert list(found) == ["b"]
    assert [problem.reason for problem in problems] == ["member.name"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_over_one_kibibyte_is_refused_with_its_member(tmp_path: Path, form: int) -> None:
    path = write(tmp_path / "a.tar", [("x" * 1100 + ".jpg", b"A"), ("b.jpg", b"B")], form)
    found, problems = read(path)
    assert list(found) == ["b"]
    assert [problem.reason for problem in problems] == ["member.name"]


def test_a_pax_header_over_64_kibibytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, comment in (("a.jpg", "x" * 70_000), ("b.jpg", "x")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 1, {"comment": comment}
            tar.addfile(info, io.BytesIO(b"x"))
    found, problems = read(path)
    assert list(found) == ["b"]
    assert [problem.reason for problem in problems] == ["member.pax"]


@pytest.mark.parametrize(
    "record", [b"999 path=x\n", b"xx path=x\n", b"9 path=x", b"14 size=many\n\n"]
)
def test_a_malformed_pax_header_is_told(tmp_path: Path, record: bytes) -> None:
    pax = special("pax", tarfile.XHDTYPE)
    path = write(
        tmp_path / "a.tar", [("a.jpg", b"A"), (pax, record), ("b.jpg", b"B"), ("c.jpg", b"C")]
    )
    found, problems = read(path)
    assert list(found) == ["a", "c"]
    assert [problem.reason for problem in problems] == ["member.pax"]


# --- samples ---


@pytest.mark.parametrize(
    ("names", "reasons"),
    [
        (["b.jpg", "b.jpg"], ["sample.repeated_field"]),
        (["b.jpg", "b.JPG"], ["sample.repeated_field"]),
        (["b.jpg", "c.jpg", "b.txt"], ["sample.repeated_key", "sample.repeated_key"]),
        (["b.txt", "b.json"], ["sample.no_image"]),
        (["b.pkl"], ["sample.no_image"]),
    ],
)
def test_samples_that_are_rejected(tmp_path: Path, names: list[str], reasons: list[str]) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"A"), *((name, b"x") for name in names)])
    found, problems = read(path)
    assert set(found) <= {"a", "c"}
    assert "b" not in found
    assert [problem.reason for problem in problems] == reasons


def test_fields_outside_the_allow_list_are_never_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar", [("a.jpg", b"A"), ("a.pkl", b"x"), ("a.pyd", b"x"), ("a.pth", b"x")]
    )
    assert read(path) == ({"a": {"jpg": b"A"}}, [])


def test_fuzzed_bytes_never_raise_and_never_leave_the_file(healthy: Path) -> None:
    content = healthy.read_bytes()
    rng = random.Random(1)
    for _ in range(80):
        mutated = bytearray(content)
        for _ in range(rng.randint(1, 20)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        del mutated[rng.choice([len(mutated), rng.randrange(len(mutated))]) :]
        healthy.write_bytes(mutated)
        for item in scanned(healthy):
            if isinstance(item, Member):
                assert 0 <= item.offset <= item.offset + item.size <= len(mutated)
