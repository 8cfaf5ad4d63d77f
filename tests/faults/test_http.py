"""A server that misbehaves in nine ways: the right bytes are read, or one line says why not."""

import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from vlm.cli.main import main
from vlm.data.dataset import Dataset, open_shards
from vlm.data.fetch import Patience
from vlm.data.remote import ShardCache
from vlm.data.shards import open_index, open_remote_index
from vlm.errors import DataError

EMOJI = Path(__file__).parents[2] / "datasets" / "emoji" / "train-0000.tar"
pytestmark = pytest.mark.fault("H")
PATIENCE = Patience(attempts=5, timeout_s=0.3, wait_s=0.01)
BOUNDARY = 512 * 1001  # between two members of the tar
CUTS = [
    BOUNDARY,
    *(pytest.param(cut, marks=pytest.mark.long) for cut in (1, 700_001, EMOJI.stat().st_size - 1)),
]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real shard and its index."""
    folder = tmp_path_factory.mktemp("indexed")
    open_index(Path(shutil.copy(EMOJI, folder)))
    return folder


@pytest.fixture
def url(web: Any, indexed: Path) -> str:
    shutil.copytree(indexed, web.folder, dirs_exist_ok=True)
    return str(web.url(EMOJI.name))


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**8, PATIENCE)


def assert_reads_as_the_local_one(url: str, cache: ShardCache, folder: Path) -> None:
    local = open_shards(str(folder / "*.tar"))
    remote = Dataset([open_remote_index(url, cache)])
    assert remote.fingerprint == local.fingerprint
    ids = range(0, len(local), 40)
    assert [remote.read(i) for i in ids] == [local.read(i) for i in ids]
    assert cache.file(url, ".tar").read_bytes() == EMOJI.read_bytes()


def refused(url: str, cache: ShardCache) -> str:
    """The line that reading ends with; nothing of the shard is visible then."""
    dataset = Dataset([open_remote_index(url, cache)])
    with pytest.raises(DataError) as caught:
        dataset.read(0)
    assert caught.value.exit_code == 3
    assert [path for path in cache.folder.iterdir() if path.is_file()] == []
    (line,) = caught.value.problems
    assert line.startswith(f"{url}: ")
    return line.removeprefix(f"{url}: ")


def begin(handler: Any, content: bytes, cut: int) -> None:
    """Promises all and sends a part."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:cut])
    handler.wfile.flush()


def reset(handler: Any) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@pytest.mark.parametrize("cut", CUTS)
def test_a_reset_in_the_body(web: Any, url: str, cache: ShardCache, cut: int) -> None:
    def fault(handler: Any, content: bytes) -> None:
        begin(handler, content, cut)
        reset(handler)

    web.faults["/train-0000.tar"] = [fault, fault]
    assert_reads_as_the_local_one(url, cache, web.folder)
    assert web.count(".tar") >= 2


@pytest.mark.parametrize("cut", CUTS)
def test_a_close_at_a_member_boundary(web: Any, url: str, cache: ShardCache, cut: int) -> None:
    web.faults["/train-0000.tar"] = [lambda handler, content: begin(handler, content, cut)]
    assert_reads_as_the_local_one(url, cache, web.folder)
    assert web.count(".tar") == 2


def test_what_has_arrived_is_not_asked_for_again(web: Any, url: str, cache: ShardCache) -> None:
    asked = []

    def note(handler: Any, content: bytes) -> None:
        asked.append(handler.headers["Range"])
        handler.answer(content[BOUNDARY:], whole=len(content))

    web.faults["/train-0000.tar"] = [lambda handler, content: begin(handler, content, BOUNDARY)]
    web.faults["/train-0000.tar"] += [note]
    assert_reads_as_the_local_one(url, cache, web.folder)
    assert asked == [f"bytes={BOUNDARY}-"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("answer", ["whole", "another", "416"])
def test_a_range_that_is_ignored(web: Any, url: str, tmp_path: Path, cut: int, answer: str) -> None:
    cache = ShardCache(tmp_path / "cache", 10**8, Patience(2, PATIENCE.timeout_s, PATIENCE.wait_s))

    def fault(handler: Any, content: bytes) -> None:
        if handler.headers["Range"] is None or answer == "whole":
            handler.answer(content, whole=len(content))
        elif answer == "another":
            handler.answer(content[cut // 2 + 1 :], whole=len(content))
        else:
            handler.send_error(416)

    web.faults["/train-0000.tar"] = [lambda handler, content: begin(handler, content, cut), fault]
    assert_reads_as_the_local_one(url, cache, web.folder)


@pytest.mark.parametrize("cut", [0, *CUTS])
def test_a_stall(web: Any, url: str, cache: ShardCache, cut: int) -> None:
    def fault(handler: Any, content: bytes) -> None:
        begin(handler, content, cut)
        web.over.wait()

    web.faults["/train-0000.tar"] = [fault]
    assert_reads_as_the_local_one(url, cache, web.folder)


def test_a_server_that_always_stalls(web: Any, url: str, cache: ShardCache) -> None:
    web.faults["/train-0000.tar"] = [lambda handler, content: web.over.wait()] * 5
    assert refused(url, cache) == "no answer for 0.3 s; tried 5 times"


@pytest.mark.long
def test_a_trickle_is_a_stall(web: Any, url: str, cache: ShardCache) -> None:
    def fault(handler: Any, content: bytes) -> None:
        begin(handler, content, 100)
        while not web.over.wait(0.05):
            handler.wfile.write(b"x")

    web.faults["/train-0000.tar"] = [fault] * 5
    assert refused(url, cache) == "less than 16384 bytes a second; tried 5 times"


def test_503_three_times(web: Any, url: str, cache: ShardCache) -> None:
    web.faults["/train-0000.tar"] = [lambda handler, content: handler.send_error(503)] * 3
    assert_reads_as_the_local_one(url, cache, web.folder)
    assert web.count(".tar") == 4


def test_503_for_ever(web: Any, url: str, cache: ShardCache) -> None:
    web.faults["/train-0000.tar"] = [lambda handler, content: handler.send_error(503)] * 9
    assert refused(url, cache) == "the server answers 503 Service Unavailable; tried 5 times"
    assert web.count(".tar") == 5


@pytest.mark.parametrize(
    "code", [404, *(pytest.param(c, marks=pytest.mark.long) for c in (403, 410))]
)
def test_an_answer_that_will_not_change(web: Any, url: str, cache: ShardCache, code: int) -> None:
    web.faults["/train-0000.tar"] = [lambda handler, content: handler.send_error(code)]
    assert refused(url, cache).startswith(f"the server answers {code} ")
    assert web.count(".tar") == 1


def test_a_shard_that_is_not_there_ends_the_command_with_3(
    web: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = web.url("train-0007.tar")
    assert main(["data", "index", url]) == 3
    assert capsys.readouterr().err == f"error: {url}: the server answers 404 Not Found\n"


@pytest.mark.parametrize(
    "extra", [b"x", *(pytest.param(e, marks=pytest.mark.long) for e in (-1, -700_000))]
)
@pytest.mark.parametrize("told", [True, False])
def test_a_wrong_length(
    web: Any, url: str, cache: ShardCache, extra: bytes | int, told: bool
) -> None:
    def fault(handler: Any, content: bytes) -> None:
        wrong = content + extra if isinstance(extra, bytes) else content[:extra]
        handler.send_response(200)
        if told:
            handler.send_header("Content-Length", str(len(wrong)))
        handler.end_headers()
        handler.wfile.write(wrong)

    web.faults["/train-0000.tar"] = [fault] * 5
    assert f"{EMOJI.stat().st_size} " in refused(url, cache)
    assert_reads_as_the_local_one(url, cache, web.folder)  # once the server is well again


@pytest.mark.parametrize("cut", CUTS)
def test_wrong_bytes_once(web: Any, url: str, cache: ShardCache, cut: int) -> None:
    web.faults["/train-0000.tar"] = [wrong_bytes(cut)]
    assert_reads_as_the_local_one(url, cache, web.folder)


def test_wrong_bytes_always(web: Any, url: str, cache: ShardCache) -> None:
    web.faults["/train-0000.tar"] = [wrong_bytes(BOUNDARY)] * 5
    assert refused(url, cache) == "its sha256 is not that of its index; tried 5 times"


def wrong_bytes(place: int) -> Any:
    def fault(handler: Any, content: bytes) -> None:
        changed = bytearray(content)
        changed[place] ^= 1
        handler.answer(bytes(changed), whole=len(content))

    return fault


@pytest.mark.parametrize(
    "code", [302, *(pytest.param(c, marks=pytest.mark.long) for c in (301, 307))]
)
def test_a_redirect(web: Any, url: str, cache: ShardCache, code: int) -> None:
    (web.folder / "other").mkdir()
    shutil.copy(EMOJI, web.folder / "other" / "place")
    web.faults["/train-0000.tar"] = [redirect(code, web.url("other/place"))]
    assert_reads_as_the_local_one(url, cache, web.folder)
    assert web.log[-1] == "/other/place"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_to_no_web_page(web: Any, url: str, cache: ShardCache, target: str) -> None:
    web.faults["/train-0000.tar"] = [redirect(302, target)] * 5
    assert refused(url, cache)


def test_redirects_in_a_circle(web: Any, url: str, cache: ShardCache) -> None:
    web.faults["/train-0000.tar"] = [redirect(302, url)] * 99
    assert "redirect" in refused(url, cache)


def redirect(code: int, target: str) -> Any:
    def fault(handler: Any, content: bytes) -> None:
        handler.send_response(code)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault
