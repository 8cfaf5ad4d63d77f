"""A strict scan of a tar's headers: its regular members, and every damage where it was met.

Nothing is ever extracted. Python's `tarfile` takes a damaged header for the end of the archive, so
a reader built on it loses the rest of a shard in silence; here each damage is an item of the scan,
which goes on at the next header whose checksum is right. Formats: ustar, pax, and GNU's long names
and large sizes.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from vlm.errors import DataError

BLOCK = 512
MAX_END_BYTES = 21 * BLOCK  # of zeros: two blocks, and what fills up a record of 20
CHUNK = 1 << 20
MAX_NAME_BYTES = 1024
MAX_PAX_BYTES = 64 * 1024

COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
LINKS_AND_DEVICES = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "FIFO",
}
DIRECTORY, PAX, GLOBAL_PAX, LONG_NAME, LONG_LINK = b"5", b"x", b"g", b"L", b"K"


class Member(NamedTuple):
    """A regular file in the tar: `size` bytes of data from byte `offset` on."""

    name: str
    offset: int
    size: int


class Problem(NamedTuple):
    """Something left out, and why, met at byte `offset`: a sample if it has a key, else bytes."""

    reason: str
    offset: int
    detail: str
    key: str = ""

    def __str__(self) -> str:
        named = f"{self.key!r}: " if self.key else ""
        return f"at byte {self.offset}: {named}{self.detail}"


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


class _Damage(Exception):
    """No header where one should be; `search_from` is where the next one may begin."""

    def __init__(self, reason: str, detail: str, search_from: int = 0) -> None:
        self.reason, self.detail, self.search_from = reason, detail, search_from
        super().__init__(detail)


def scan(descriptor: int, *, name: str) -> Iterator[Member | Problem]:
    """Yields every regular member of an open tar file, and each problem where it was met.

    Args:
        descriptor: An open file; read with `pread`, so its position does not matter.
        name: What to call the file in an error.

    Raises:
        DataError: The file is compressed.
    """
    end = os.fstat(descriptor).st_size
    _refuse_compressed(os.pread(descriptor, 6, 0), name)
    if end == 0:
        yield Problem("shard.empty", 0, "the file has no bytes")
        return
    position = 0
    # what pax and GNU headers say about the next member; None: it is refused
    said: dict[str, str] | None = {}
    while position < end:
        try:
            header = _header_at(descriptor, position, said or {}, end)
        except _Damage as damage:
            following = _next_header(descriptor, max(damage.search_from, position + BLOCK), end)
            yield _problem(damage, position, following, end)
            if following == end:
                return
            position, said = following, {}
            continue
        if header is None:
            return
        item, said = _take(descriptor, position + BLOCK, header, said)
        if item is not None:
            yield item
        position += BLOCK + -(-header.size // BLOCK) * BLOCK
    yield Problem("shard.truncated", end, "the file ends without an end-of-archive marker")


def _refuse_compressed(start: bytes, name: str) -> None:
    for magic, (kind, tool) in COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{name}: is compressed with {kind}, but samples are read by random access; "
                f"unpack it first ({tool})"
            )


def _header_at(descriptor: int, position: int, said: dict[str, str], end: int) -> _Header | None:
    """The header at `position` with the size that counts, or None at the end-of-archive marker."""
    block = os.pread(descriptor, BLOCK, position)
    if not block.strip(b"\0"):
        after = _after_zeros(descriptor, position, end)
        if after == end and end - position <= MAX_END_BYTES:
            return None
        if after == end:
            raise _Damage("shard.zeroed", "zeros to the end, more than a tar is padded with", end)
        raise _Damage("shard.zeroed", "zeros where a header should be", after)
    header = _parse_header(block)
    if header.kind in LINKS_AND_DEVICES or header.kind == DIRECTORY:
        header = header._replace(size=0)
    elif "size" in said and header.kind not in (PAX, GLOBAL_PAX, LONG_NAME, LONG_LINK):
        header = header._replace(size=int(said["size"]))
    if position + BLOCK + header.size > end:
        missing = position + BLOCK + header.size - end
        raise _Damage("shard.truncated", f"{_shown(header)} lacks its last {missing} bytes")
    return header


def _parse_header(block: bytes) -> _Header:
    if len(block) < BLOCK:
        raise _Damage("shard.truncated", "the file ends inside a header")
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise _Damage("shard.header", "not a tar header: its checksum is wrong")
    magic = block[257:263]
    if magic not in (b"ustar\0", b"ustar ", bytes(6)):
        raise _Damage("shard.header", "not a header of ustar, pax or GNU tar")
    name = block[:100].partition(b"\0")[0]
    # GNU tar keeps times where ustar keeps the folder's name
    prefix = block[345:500].partition(b"\0")[0] if magic == b"ustar\0" else b""
    return _Header(
        prefix + b"/" + name if prefix else name, _number(block[124:136]), block[156:157]
    )


def _number(digits: bytes) -> int:
    """An octal field, or GNU's base-256; never negative."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.partition(b"\0")[0].strip(b" ")
    if re.fullmatch(rb"[0-7]*", text) is None:
        raise _Damage("shard.header", "not a tar header: a number in it is not octal")
    return int(text or b"0", 8)


def _shown(header: _Header) -> str:
    return repr(header.name.decode("utf-8", "replace")[:100])


def _after_zeros(descriptor: int, position: int, end: int) -> int:
    """The block that holds the first byte that is not zero, or `end`."""
    while chunk := os.pread(descriptor, CHUNK, position):
        if rest := len(chunk.lstrip(b"\0")):
            return position + (len(chunk) - rest) // BLOCK * BLOCK
        position += len(chunk)
    return end


def _next_header(descriptor: int, position: int, end: int) -> int:
    """Where the next header with a right checksum begins, or `end`; a search for its magic."""
    while position < end:
        chunk = os.pread(descriptor, CHUNK + BLOCK, position)
        at = chunk.find(b"ustar")
        while at >= 0:
            start = at - 257
            if start >= 0 and start % BLOCK == 0 and _is_header(chunk[start : start + BLOCK]):
                return position + start
            at = chunk.find(b"ustar", at + 1)
        position += CHUNK
    return end


def _is_header(block: bytes) -> bool:
    try:
        _parse_header(block)
    except _Damage:
        return False
    return True


def _problem(damage: _Damage, position: int, following: int, end: int) -> Problem:
    if following < end:
        detail = f"{damage.detail}; the next member found is at byte {following}"
        return Problem(damage.reason, position, detail)
    if damage.reason == "shard.zeroed" and damage.search_from < end:
        lost = end - damage.search_from
        detail = f"{lost} bytes after the end-of-archive marker, none of them a member"
        return Problem("shard.trailing", damage.search_from, detail)
    return Problem(damage.reason, position, f"{damage.detail}; no member after it")


def _take(
    descriptor: int, offset: int, header: _Header, said: dict[str, str] | None
) -> tuple[Member | Problem | None, dict[str, str] | None]:
    """What the header contributes to the scan, and what is now said about the next member."""
    if header.kind == GLOBAL_PAX or header.kind == LONG_LINK:
        return None, said
    if header.kind in (PAX, LONG_NAME):
        more = _extension(descriptor, offset, header)
        if isinstance(more, Problem):
            return more, None
        return None, None if said is None else said | more
    if header.kind == DIRECTORY or said is None:
        return None, {}
    return _member(offset, header, said), {}


def _extension(descriptor: int, offset: int, header: _Header) -> dict[str, str] | Problem:
    """What a pax or a GNU long-name header says about the member after it."""
    limit = MAX_PAX_BYTES if header.kind == PAX else MAX_NAME_BYTES + 1
    reason = "member.pax" if header.kind == PAX else "member.name"
    if header.size > limit:
        return Problem(reason, offset - BLOCK, f"{header.size} bytes; at most {limit} are read")
    data = os.pread(descriptor, header.size, offset)
    try:
        if header.kind == LONG_NAME:
            return {"path": data.rstrip(b"\0").decode()}
        records = _pax_records(data)
    except ValueError as error:
        return Problem(reason, offset - BLOCK, f"a malformed extended header: {error}")
    return records


def _pax_records(data: bytes) -> dict[str, str]:
    """POSIX.1-2001 `pax`: records of length, blank, key=value, newline."""
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= 5 else 0
        record, data = data[len(digits) + 1 : length], data[length:]
        key, equals, value = record.partition(b"=")
        if length > len(digits) + 1 + len(record) or not equals or not value.endswith(b"\n"):
            raise ValueError("its records do not add up")
        records[key.decode()] = value[:-1].decode() if key in (b"path", b"size") else ""
    if not records.get("size", "0").isdecimal() or len(records.get("size", "")) > 20:
        raise ValueError("its size is no number")
    return records


def _member(offset: int, header: _Header, said: dict[str, str]) -> Member | Problem:
    at = offset - BLOCK
    try:
        name = said["path"] if "path" in said else header.name.decode()
    except UnicodeDecodeError:
        return Problem("member.name", at, f"{_shown(header)}: a name that is not UTF-8")
    if len(name.encode()) > MAX_NAME_BYTES:
        return Problem("member.name", at, f"a name of more than {MAX_NAME_BYTES} bytes")
    if not name or re.search(r"[\x00-\x1f\x7f]", name):
        return Problem("member.name", at, f"{name!r}: an empty name, or control characters in it")
    if name.startswith("/") or ".." in name.split("/"):
        return Problem("member.name", at, f"{name!r}: a path that leaves its folder")
    if header.kind in LINKS_AND_DEVICES:
        return Problem("member.type", at, f"{name!r}: a {LINKS_AND_DEVICES[header.kind]}")
    sparse = any(key.startswith("GNU.sparse") for key in said)
    if sparse or header.kind not in (b"0", b"\0", b"7"):
        return Problem("member.type", at, f"{name!r}: not a plain file (type {header.kind!r})")
    return Member(name, offset, header.size)
