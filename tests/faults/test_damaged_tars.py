"""Damaged shards, by class: what is lost is told when the shard is indexed, and pairs stay pairs.

Every picture and every text of a healthy shard names its sample, so a wrong pair shows. Kept,
rejected and masked samples add up to all: a sample that cannot be read lies where a problem was
told, or after the place where the rest of the shard was told to be gone.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from dataclasses import dataclass
from itertools import pairwise

import pytest
from PIL import Image

from vlm.data import tar
from vlm.data.dataset import open_shards
from vlm.data.loader import training_batches
from vlm.data.order import SampleOrder
from vlm.data.samples import BadSample
from vlm.data.transforms import TrainTransform
from vlm.errors import DataError
from vlm.tokenizer import train_bpe

pytestmark = pytest.mark.fault("C1")
NUM_SAMPLES = 12
ALL_PLACES = (0, 3, 5, 8, 11)  # samples
PLACES = [n if n == 5 else pytest.param(n, marks=pytest.mark.long) for n in ALL_PLACES]
SUFFIXES = ("png", "json", "txt")


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (number + 1, 3)).save(file, "PNG")  # its width names the sample
    return file.getvalue()


def fields(number):
    texts = [f"caption {number}"]
    return {
        "png": picture(number),
        "json": json.dumps({"captions": texts, "number": number}).encode(),
        "txt": f"caption {number}".encode() * (1 + 60 * (number % 3)),
    }


def members_of(numbers):
    return [(f"s{n:03}.{suffix}", data) for n in numbers for suffix, data in fields(n).items()]


def write(path, members, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@dataclass
class Shard:
    """A healthy shard: its bytes, where each member's header begins, and each sample's bytes."""

    content: bytes
    headers: list[int]  # three a sample, and the end of the last member

    def header(self, sample, field=0):
        return self.headers[3 * sample + field]

    def span(self, sample):
        return self.headers[3 * sample], self.headers[3 * sample + 3]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("healthy") / "a.tar", members_of(range(NUM_SAMPLES)))
    with path.open("rb") as file:
        found = list(tar.scan(file.fileno(), name="a.tar"))
    last = found[-1]
    end = last.offset + -(-last.size // 512) * 512
    return Shard(path.read_bytes(), [member.offset - 512 for member in found] + [end])


@pytest.fixture
def outcome(tmp_path):
    """Opens a shard's bytes: the numbers of the samples read, and its problems; nothing else."""

    def outcome(content):
        path = tmp_path / "train-0000.tar"
        path.write_bytes(content)
        told = []
        dataset = open_shards(str(path), log=told.append)
        kept = {}
        for sample_id in range(len(dataset)):
            sample = dataset.read(sample_id)
            number = int(sample.key.removeprefix("./")[1:4])
            assert sample.captions == (f"caption {number}",)
            assert sample.meta == {"number": number}
            assert Image.open(io.BytesIO(sample.image)).width == number + 1
            kept[number] = sample
        problems = [*dataset.shards[0].details().quarantine]
        assert sum(dataset.rejects.values()) == len(problems)  # none is told that is not counted
        assert bool(told) == bool(problems)
        return kept, problems

    return outcome


def unexplained(shard, kept, problems):
    """Samples that were lost without a word about the place where they lay."""
    spots = [problem.offset for problem in problems]
    rest = [p.offset for p in problems if "no member after it" in p.detail or "end-of" in p.detail]
    gaps = [
        (p.offset, int(match.group(1)))
        for p in problems
        if (match := re.search(r"next member found is at byte (\d+)", p.detail))
    ]
    lost = set(range(NUM_SAMPLES)) - set(kept)
    for number in sorted(lost):
        begin, end = shard.span(number)
        told = any(begin <= spot < end for spot in spots)
        told |= any(spot <= begin for spot in rest)
        told |= any(first < end and begin < last for first, last in gaps)
        if told:
            lost.remove(number)
    return lost


# --- the rest of the shard is gone ---


@pytest.mark.parametrize("place", PLACES[1:])  # one incomplete sample alone compares with nothing
@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize(
    ("past_header", "what"),
    [(0, "end-of-archive"), (1, "inside a header"), (300, "inside a header"), (515, "lacks its")],
)
def test_a_cut_keeps_what_is_before_it(healthy, outcome, place, field, past_header, what):
    kept, problems = outcome(healthy.content[: healthy.header(place, field) + past_header])
    assert list(kept) == list(range(place))
    assert problems[0].reason == "shard.truncated"
    assert what in problems[0].detail
    assert unexplained(healthy, kept, problems) == set()


# --- damage in the middle ---


def flip(byte, bit=0x10):
    def harm(content, at):
        content[at + byte] ^= bit

    return harm


def zero(size):
    def harm(content, at):
        content[at : at + size] = bytes(size)

    return harm


def claim(size):
    """A header that is right but for the size it claims."""

    def harm(content, at):
        content[at + 124 : at + 136] = size
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])

    return harm


HARMS = {  # and how many bytes it spoils
    "flipped byte of the name": (flip(2), 1),
    "flipped byte of the size": (flip(130, 0x01), 1),
    "flipped byte of the type": (flip(156, 0x01), 1),
    "flipped byte of the checksum": (flip(150, 0x01), 1),
    "flipped byte of the magic": (flip(258), 1),
    "zeroed header": (zero(512), 512),
    "zeroed page": (zero(1024), 1024),
    "zeroed 4 KiB": (zero(4096), 4096),
    "negative size": (claim(b"\xff" * 12), 1),
    "8 EiB": (claim(b"\x80\0\0\0" + (2**63).to_bytes(8, "big")), 1),
    "size beyond the end": (claim(b"00077777777\0"), 1),
    "no octal number": (claim(b"what is this"), 1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("harm", HARMS)
def test_damage_costs_the_samples_it_lies_in(healthy, outcome, harm, place):
    spoil, size = HARMS[harm]
    for field in range(3):
        content = bytearray(healthy.content)
        at = healthy.header(place, field)
        if at + size > healthy.headers[-1]:
            continue  # reaches into the padding: see the shards whose end is zeros
        spoil(content, at)
        kept, problems = outcome(content)
        spans = {number: healthy.span(number) for number in range(NUM_SAMPLES)}
        hit = {n for n, (begin, end) in spans.items() if begin < at + size and at < end}
        if at + size == healthy.headers[-1] and size > 512:
            continue
        assert set(kept) == set(range(NUM_SAMPLES)) - hit
        assert problems[0].reason.startswith("shard.")
        assert unexplained(healthy, kept, problems) == set()


@pytest.mark.parametrize("place", PLACES[1:])
def test_a_shard_whose_end_is_zeros_is_told(healthy, outcome, place):
    """A file made at its full size and never filled; tars end in at most 10.5 KiB of zeros."""
    for field in range(3):
        at = healthy.header(place, field)
        content = healthy.content[:at] + bytes(len(healthy.content) + 10240 - at)
        kept, problems = outcome(content)
        assert [problem.reason for problem in problems][:1] == ["shard.zeroed"]
        assert (problems[0].offset, list(kept)) == (at, list(range(place)))
        assert unexplained(healthy, kept, problems) == set()


def test_two_samples_of_one_key_are_never_joined_over_a_damage(healthy, tmp_path, outcome):
    """What is left of them is one picture, and the texts of the other."""
    members = [(n.replace("s004", "s003"), data) for n, data in members_of(range(NUM_SAMPLES))]
    content = bytearray(write(tmp_path / "x.tar", members).read_bytes())
    begin, end = healthy.header(3, 1), healthy.header(4, 1)
    content[begin:end] = bytes(end - begin)
    kept, problems = outcome(content)
    assert set(range(NUM_SAMPLES)) - set(kept) == {3, 4}
    reasons = [problem.reason for problem in problems]
    assert reasons == ["shard.zeroed", "sample.damaged", "sample.damaged"]


def test_trailing_garbage_is_told_and_costs_nothing(healthy, outcome):
    for garbage in (b"x", b"garbage" * 1000, b"\0" * 512 + b"x"):
        kept, problems = outcome(healthy.content + garbage)
        assert len(kept) == NUM_SAMPLES
        assert [problem.reason for problem in problems] == ["shard.trailing"]


def test_a_sector_of_another_file_is_told(healthy, outcome):
    content = bytearray(healthy.content)
    at = healthy.header(5)
    content[at : at + 512] = b"\x7fELF" * 128
    kept, problems = outcome(content)
    assert set(range(NUM_SAMPLES)) - set(kept) == {5}
    assert unexplained(healthy, kept, problems) == set()


# --- members that are not what a sample is made of ---


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_member_that_comes_twice_costs_its_sample(tmp_path, outcome, place, suffix):
    members = members_of(range(NUM_SAMPLES))
    twin = 3 * place + SUFFIXES.index(suffix)
    members.insert(twin, members[twin])
    kept, problems = outcome(write(tmp_path / "x.tar", members).read_bytes())
    assert set(range(NUM_SAMPLES)) - set(kept) == {place}
    assert [problem.reason for problem in problems] == ["sample.repeated_field"]


@pytest.mark.parametrize("place", ALL_PLACES[:-1])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_that_are_not_side_by_side_are_never_joined(tmp_path, outcome, place, suffix):
    members = members_of(range(NUM_SAMPLES))
    stray = members.pop(3 * place + SUFFIXES.index(suffix))
    members.append(stray)
    kept, problems = outcome(write(tmp_path / "x.tar", members).read_bytes())
    assert set(range(NUM_SAMPLES)) - set(kept) == {place}
    assert {problem.reason for problem in problems} == {"sample.repeated_key"}
    assert len(problems) == 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_links_and_devices_are_told_and_never_followed(tmp_path, outcome, place, kind, suffix):
    members = members_of(range(NUM_SAMPLES))
    position = 3 * place + SUFFIXES.index(suffix)
    info = tarfile.TarInfo(members[position][0])
    info.type, info.linkname = kind, "/etc/passwd"
    members[position] = (info, b"")
    kept, problems = outcome(write(tmp_path / "x.tar", members).read_bytes())
    assert set(range(NUM_SAMPLES)) - set(kept) == {place}
    assert problems[0].reason == "member.type"


def test_folders_are_no_members(tmp_path, outcome):
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    members = members_of(range(NUM_SAMPLES))
    for position in (0, 9, 18, 27, 36):
        members.insert(position, (folder, b""))
    kept, problems = outcome(write(tmp_path / "x.tar", members).read_bytes())
    assert (len(kept), problems) == (NUM_SAMPLES, [])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["../{}", "/etc/{}", "a/../../{}", "a\n{}", "\x1b[2J{}", "{}\x7f"])
def test_names_that_leave_the_folder_or_hide_are_told(tmp_path, outcome, place, name):
    members = members_of(range(NUM_SAMPLES))
    for position in range(3 * place, 3 * place + 3):
        old, data = members[position]
        members[position] = (name.format(old), data)
    kept, problems = outcome(write(tmp_path / "x.tar", members).read_bytes())
    assert set(range(NUM_SAMPLES)) - set(kept) == {place}
    assert [problem.reason for problem in problems][:3] == ["member.name"] * 3


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("length", [90, 101, 250, 900])
def test_long_names_are_whole_or_told(tmp_path, outcome, form, length):
    members = [
        (name.replace(".", "x" * (length if name.startswith("s007") else 0) + ".", 1), data)
        for name, data in members_of(range(NUM_SAMPLES))
    ]
    kept, problems = outcome(write(tmp_path / "x.tar", members, form).read_bytes())
    assert (len(kept), problems) == (NUM_SAMPLES, [])
    assert kept[7].key == "s007" + "x" * length


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("field", range(3))
def test_a_long_name_that_is_damaged_never_becomes_a_short_one(tmp_path, outcome, form, field):
    """The header that follows still holds the first 100 bytes of the name, and a right checksum."""
    members = [(f"{'x' * 96}{name}", data) for name, data in members_of(range(NUM_SAMPLES))]
    path = write(tmp_path / "x.tar", [(n[96:], d) for n, d in members[:21]] + members[21:24], form)
    whole = bytearray(path.read_bytes())
    with path.open("rb") as file:
        found = [item for item in tar.scan(file.fileno(), name="x") if isinstance(item, tar.Member)]
    at = found[20 + field].offset + -(-found[20 + field].size // 512) * 512
    whole[at + 100] ^= 0x10
    kept, problems = outcome(whole)
    assert list(kept) == list(range(7))
    assert problems[0].reason == "shard.header"


# --- no samples at all: an error that names the shard ---

NO_SHARD = {
    "empty file": b"",
    "a page of HTML": b"<!doctype html><title>404 Not Found</title>" * 40,
    "a picture": picture(3),
    "end of archive only": bytes(10240),
    "zeros": bytes(40960),
    "random bytes": bytes((i * 7919 >> 3) % 256 for i in range(20000)),
}


@pytest.mark.parametrize("name", NO_SHARD)
def test_what_is_no_shard_is_an_error_that_says_so(outcome, tmp_path, name):
    with pytest.raises(DataError, match=r"^train-0000\.tar: holds no samples: shard\.") as error:
        outcome(NO_SHARD[name])
    assert len(error.value.problems) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train-0000.tar"]  # and leaves no index


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_shard_is_an_error_that_names_the_tool(healthy, outcome, compress):
    for content in (healthy.content, healthy.content[:512], b"", bytes(10**7)):
        with pytest.raises(DataError, match=r"is compressed with .*; unpack it first"):
            outcome(compress(content))


# --- after the shard was indexed: masked, counted, and the sum is all ---


def changed_after_indexing(content, healthy, how):
    if how == "flipped":
        for number in (3, 6, 11):
            content[healthy.header(number, 0) + 520] ^= 1
        return {3, 6, 11}
    if how in ("cut", "cut while open"):
        del content[healthy.header(9, 1) :]
        return set(range(9 if how == "cut while open" else 0, NUM_SAMPLES))
    content[healthy.header(5, 2) + 512] ^= 0x80
    return {5}


@pytest.mark.parametrize("how", ["flipped", "cut", "cut while open", "caption"])
def test_damage_after_indexing_is_masked_and_counted(healthy, tmp_path, how):
    path = tmp_path / "train-0000.tar"
    path.write_bytes(healthy.content)
    dataset = open_shards(str(path))
    if how == "cut while open":
        dataset.read(0)
    reason = "shard.size" if how == "cut" else "shard.crc"
    content = bytearray(healthy.content)
    hit = changed_after_indexing(content, healthy, how)
    path.write_bytes(content)
    valid, bad = epoch_of(dataset)
    assert {number for number, ok in enumerate(valid) if not ok} == hit
    assert bad.counts == {reason: len(hit)}
    assert {place.key for place in bad.examples[reason]} <= {f"s{n:03}" for n in hit}
    for number in set(range(NUM_SAMPLES)) - hit:
        assert dataset.read(number).captions == (f"caption {number}",)
    for number in hit:
        with pytest.raises(BadSample, match=reason):
            dataset.read(number)


def epoch_of(dataset):
    order = SampleOrder(dataset.shard_sizes, seed=0, streams=1, global_batch_size=len(dataset))
    batches = training_batches(
        dataset,
        order,
        transform=TrainTransform(4),
        tokenizer=train_bpe(["caption 1"], vocab_size=300, context_length=8),
        seed=0,
        micro_batch_size=len(dataset),
    )
    batch = next(batches)
    batches.close()
    valid = [False] * len(dataset)
    for sample_id, ok in zip(batch.sample_ids.tolist(), batch.valid.tolist(), strict=True):
        valid[sample_id] = ok
    assert sorted(batch.sample_ids.tolist()) == list(range(len(dataset)))
    return valid, batch.bad


def test_the_ledger_of_this_file_would_notice_a_silent_loss(healthy):
    kept = dict.fromkeys(range(NUM_SAMPLES - 1))
    assert unexplained(healthy, kept, []) == {NUM_SAMPLES - 1}
    assert all(begin < end for begin, end in pairwise(healthy.headers))
