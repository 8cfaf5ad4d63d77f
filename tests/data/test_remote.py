"""Remote shards: one download a node, a cache that stays in its bounds, and nothing unverified."""

import fcntl
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.cli.main import main
from vlm.curate.check import Case, check
from vlm.data.dataset import Dataset, open_shards
from vlm.data.fetch import Patience, fetch
from vlm.data.loader import training_batches
from vlm.data.mixture import MixedOrder
from vlm.data.order import Order, SampleOrder, shards_of_steps
from vlm.data.patterns import expand
from vlm.data.prefetch import Prefetcher, look_ahead
from vlm.data.remote import RemoteShard, ShardCache, index_url
from vlm.data.shards import open_index, open_remote_index
from vlm.data.transforms import TrainTransform
from vlm.errors import ConfigError, DataError, DiskError
from vlm.tokenizer import build_tokenizer

MakeShard = Callable[..., Path]
PATIENCE = Patience(attempts=3, timeout_s=2.0, wait_s=0.01)


@pytest.fixture
def publish(web: Any, make_shard: MakeShard) -> Callable[..., str]:
    """Makes an indexed shard of so many samples and returns its URL."""

    def publish(name: str = "train-0000.tar", samples: int = 3) -> str:
        target = web.folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.move(make_shard(samples, name=Path(name).name), target)
        open_index(target)
        return str(web.url(name))

    return publish


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**8, PATIENCE)


def remote_shard(url: str, cache: ShardCache) -> RemoteShard:
    shard = open_remote_index(url, cache).remote
    assert shard is not None
    return shard


def tars(cache: ShardCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if path.is_file()]


def samples(dataset: Dataset) -> list[Any]:
    return [dataset.read(i) for i in range(len(dataset))]


# --- what is read ---


def test_a_remote_data_set_reads_as_the_local_one(
    web: Any, publish: Callable[..., str], tmp_path: Path
) -> None:
    for number in range(3):
        publish(f"train-{number:04}.tar")
    local = open_shards(str(web.folder / "*.tar"))
    remote = open_shards(web.url("train-{0000..0002}.tar"), tmp_path / "cache")
    assert web.count(".tar") == 0  # the indexes are enough to know what there is
    assert remote.fingerprint == local.fingerprint
    assert samples(remote) == samples(local)
    assert samples(open_shards(web.url("train-{0000..0002}.tar"), tmp_path / "cache"))
    assert sorted(web.log) == sorted(set(web.log))


def test_a_query_belongs_to_the_url_and_is_not_shown(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    url = publish() + "?signature=secret"
    assert index_url(url) == web.url("train-0000.tar.idx?signature=secret")
    shard = open_remote_index(url, cache)
    assert (shard.name, shard.where) == ("train-0000.tar", web.url("train-0000.tar?..."))
    assert len(samples(Dataset([shard]))) == 3


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{0000,0001}.tar"])
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_schemes_go_through_fsspec(
    web: Any, publish: Callable[..., str], tmp_path: Path, scheme: str, pattern: str
) -> None:
    import fsspec

    for number in range(2):
        publish(f"train-{number:04}.tar")
    root = f"{scheme}://{web.folder}"
    if scheme == "memory":
        for file in web.folder.iterdir():
            fsspec.filesystem("memory").pipe(str(file), file.read_bytes())
    remote = open_shards(f"{root}/{pattern}", tmp_path / "cache")
    assert samples(remote) == samples(open_shards(str(web.folder / "*.tar")))
    with pytest.raises(DataError, match=r'no shard matches "\w+://.*/val-\*.tar"'):
        expand(f"{root}/val-*.tar")
    with pytest.raises(DataError, match=r"val\.tar: there is no such file"):
        open_shards(f"{root}/val.tar", tmp_path / "cache")


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("http://h/train-*.tar", "a web server cannot be listed; name ranges: {0000..0123}"),
        ("htps://h/x.tar", "did you mean https://?"),
        ("https://h:port/x.tar", "Port could not be cast to integer value as 'port'"),
    ],
)
def test_urls_that_cannot_be_are_refused(pattern: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(pattern)
    assert str(caught.value) == f'"{pattern}": {problem}'


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="no user or password") as caught:
        expand("https://me:secret@host/x.tar")
    assert "secret" not in str(caught.value)


def test_equal_file_names_do_not_mix(publish: Callable[..., str], tmp_path: Path) -> None:
    urls = [publish("one/train.tar", 2), publish("other/train.tar", 4)]
    dataset = open_shards(urls, tmp_path / "cache")
    assert dataset.shard_sizes == [2, 4]
    assert [sample.key for sample in samples(dataset)] == ["s0", "s1", "s0", "s1", "s2", "s3"]


# --- the index ---


def test_a_remote_shard_without_an_index_says_how_to_make_one(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    url = publish()
    (web.folder / "train-0000.tar.idx").unlink()
    with pytest.raises(ConfigError) as caught:
        open_remote_index(url, cache)
    assert str(caught.value) == (
        f"{url}.idx: the server answers 404 Not Found; a remote shard needs its index beside it: "
        'run "vlm data index FOLDER/*.tar" where the tars are, and upload the .tar.idx files'
    )


@pytest.mark.parametrize("place", [3, -1, -200])
def test_a_damaged_index_is_refused(
    web: Any, publish: Callable[..., str], cache: ShardCache, place: int
) -> None:
    url, path = publish(), web.folder / "train-0000.tar.idx"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_remote_index(url, cache)
    assert str(caught.value) == (
        f"{url}.idx: it is damaged, or of another version of vlm; tried 3 times"
    )
    assert list((cache.folder / "index").iterdir()) == []


def test_a_damaged_copy_of_an_index_is_fetched_again(
    publish: Callable[..., str], cache: ShardCache
) -> None:
    url = publish()
    open_remote_index(url, cache)
    os.truncate(cache.file(url, ".idx"), 100)
    assert open_remote_index(url, cache).num_samples == 3


def test_a_field_that_no_remote_index_holds_says_how_to_get_it(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    url = publish()
    with pytest.raises(ConfigError) as caught:
        open_remote_index(url, cache, fields=["similarity"])
    assert str(caught.value) == (
        f"{url}: its index lacks similarity; run vlm data index --field similarity where the tars "
        f"are, upload the .tar.idx files, and delete {cache.folder / 'index'}"
    )
    os.unlink(cache.file(url, ".idx"))
    open_index(web.folder / "train-0000.tar", fields=["similarity"])
    assert open_remote_index(url, cache, fields=["similarity"]).columns == ("similarity",)


def test_index_tells_of_remote_shards_what_it_tells_of_local_ones(
    web: Any,
    publish: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(2):
        publish(f"{number}.tar")
    assert main(["data", "index", str(web.folder / "*.tar")]) == 0
    local = capsys.readouterr().out
    assert main(["data", "index", web.url("{0..1}.tar")]) == 0
    assert capsys.readouterr().out == local
    assert web.count(".tar") == 0
    assert main(["data", "index", web.url("0.tar"), "--out", str(tmp_path / "out")]) == 2
    assert "--out is for local shards" in capsys.readouterr().err


def test_a_joined_index_at_a_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="is read from disk alone; name the remote shards"):
        open_shards("https://host/shards.json")


def test_check_reads_remote_shards_too(
    web: Any, publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [publish(f"{number}.tar") for number in range(3)]
    assert check(urls[:2], decode=True, cache_dir=tmp_path / "cache").to_json()["clean"]
    assert web.count(".tar") == 2
    web.faults["/2.tar"] = [lambda handler, content: handler.send_error(403)]
    report = check(urls, cache_dir=tmp_path / "cache")
    assert report.cases == {
        "shard.unreadable": [Case("2.tar", "", f"{urls[2]}: the server answers 403 Forbidden")]
    }


# --- the cache ---


def test_a_cut_copy_is_noticed_and_fetched_again(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    dataset = Dataset([open_remote_index(publish(), cache)])
    before = samples(dataset)
    (tar,) = tars(cache)
    os.truncate(tar, 1024)
    assert samples(dataset) == before
    assert web.count(".tar") == 2


def test_a_copy_whose_bytes_changed_is_fetched_again(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    dataset = Dataset([open_remote_index(publish(), cache)])
    before = samples(dataset)
    (tar,) = tars(cache)
    content = bytearray(tar.read_bytes())
    content[520] ^= 1
    tar.write_bytes(content)
    assert samples(dataset) == before
    assert web.count(".tar") == 2


READ = """
import sys
from pathlib import Path
from vlm.data.dataset import open_shards
dataset = open_shards(sys.argv[1], Path(sys.argv[2]))
assert len([dataset.read(i) for i in range(len(dataset))]) == 3
"""


def test_processes_that_want_one_shard_at_once_download_it_once(
    web: Any, publish: Callable[..., str], tmp_path: Path
) -> None:
    def slow(handler: Any, content: bytes) -> None:
        time.sleep(1.0)
        handler.answer(content, whole=len(content))

    url = publish()
    web.faults["/train-0000.tar"] = [slow] * 9
    command = [sys.executable, "-c", READ, url, str(tmp_path / "cache")]
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert web.log == ["/train-0000.tar.idx", "/train-0000.tar"]


def test_threads_that_want_one_shard_at_once_download_it_once(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    shard = remote_shard(publish(), cache)
    threads = [threading.Thread(target=shard.fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert web.count(".tar") == 1


def test_a_killed_download_leaves_nothing_visible_and_takes_no_room(
    web: Any, publish: Callable[..., str], tmp_path: Path
) -> None:
    url, other = publish(), publish("other.tar")
    size = (web.folder / "train-0000.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache" / "remote", size + 100, PATIENCE)
    shard, begun = remote_shard(url, cache), threading.Event()

    def half(handler: Any, content: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content[: size // 2])
        begun.set()
        web.over.wait()

    web.faults["/train-0000.tar"] = [half]
    child = subprocess.Popen([sys.executable, "-c", READ, url, str(cache.folder.parent)])
    assert begun.wait(60)
    time.sleep(0.1)  # for some bytes to be written
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert [path.suffix for path in tars(cache)] == [".part"]
    os.close(remote_shard(other, cache).open())  # there is room for one
    assert [path.suffix for path in tars(cache)] == [".tar"]
    os.close(shard.open())
    assert tars(cache) == [shard.path]


def test_the_cache_keeps_what_was_used_last_within_its_bound(
    web: Any, publish: Callable[..., str], tmp_path: Path
) -> None:
    urls = [publish(f"{number}.tar") for number in range(4)]
    size = (web.folder / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2 * size, PATIENCE)
    shards = [remote_shard(url, cache) for url in urls]
    for number in (0, 1, 0, 2):
        os.close(shards[number].open())
        time.sleep(0.01)  # a file system's clock ticks every few milliseconds
        assert sum(path.stat().st_size for path in tars(cache)) <= 2 * size
    assert [shard.is_here for shard in shards] == [True, False, True, False]
    shards[0].touch()
    os.close(shards[3].open())
    assert [shard.is_here for shard in shards] == [True, False, False, True]


def test_a_shard_that_is_open_is_not_deleted(
    web: Any, publish: Callable[..., str], tmp_path: Path
) -> None:
    urls = [publish(f"{number}.tar") for number in range(3)]
    size = (web.folder / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2 * size, PATIENCE)
    held, other, third = [remote_shard(url, cache) for url in urls]
    descriptor = held.open()
    time.sleep(0.01)
    os.close(other.open())
    os.close(third.open())
    assert [held.is_here, other.is_here, third.is_here] == [True, False, True]
    second = third.open()
    thread = threading.Thread(target=other.fetch)  # waits: both are in use
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert [held.is_here, third.is_here] == [True, True]
    os.close(descriptor)
    thread.join(10)
    assert [held.is_here, other.is_here, third.is_here] == [False, True, True]
    os.close(second)


def test_who_opens_a_shard_while_it_is_deleted_fetches_it(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    shard, opened = remote_shard(publish(), cache), list[int]()
    shard.fetch()
    with shard.path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as who makes room does
        thread = threading.Thread(target=lambda: opened.append(shard.open()))
        thread.start()
        thread.join(0.2)
        assert opened == []
        shard.path.unlink()
    thread.join(10)
    assert os.fstat(opened[0]).st_ino == shard.path.stat().st_ino
    os.close(opened[0])


def test_reading_holds_no_remote_shard_open(publish: Callable[..., str], cache: ShardCache) -> None:
    dataset = Dataset([open_remote_index(publish(), cache)])
    dataset.read(0)
    (tar,) = tars(cache)
    with tar.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_cache_smaller_than_a_shard_is_refused(
    publish: Callable[..., str], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 1000, PATIENCE)
    with pytest.raises(ConfigError, match=r"shard_cache_gib \(9.31e-07\) is less than one shard"):
        remote_shard(publish(), cache).open()


def test_a_cache_that_cannot_be_written_is_a_disk_error(
    publish: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written: Not a directory"):
        open_remote_index(publish(), ShardCache(tmp_path / "file", 10**8, PATIENCE))


# --- looking ahead ---


SIZES = [5, 0, 17, 40, 1, 0, 33, 26, 50, 9]


def first_uses(order: Order, steps: range, rank: int, world_size: int) -> list[int]:
    """The slow way: sample by sample."""
    found: dict[int, None] = {}
    for step in steps:
        for sample_id in order.batch(step, rank=rank, world_size=world_size)[1].tolist():
            passed = 0
            for shard, size in enumerate(SIZES):
                passed += size
                if sample_id < passed:
                    found.setdefault(shard)
                    break
    return list(found)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("streams", "rank", "world_size"), [(1, 0, 1), (4, 1, 2), (8, 3, 4)])
def test_the_shards_to_come_are_those_of_the_batches(
    streams: int, rank: int, world_size: int, mixed: bool
) -> None:
    options: dict[str, Any] = {"streams": streams, "global_batch_size": 16, "block_size": 12}
    order: Order = SampleOrder(SIZES, seed=3, **options)
    if mixed:
        order = MixedOrder([SIZES[:4], SIZES[4:]], [1, 3], seed=3, **options)
    for first in (0, 5, 11):  # the last crosses into the next epoch
        steps = range(first, first + 4)
        expected = first_uses(order, steps, rank, world_size)
        found = shards_of_steps(order, SIZES, steps, rank=rank, world_size=world_size)
        assert found == expected


def prefetched(shards: list[RemoteShard], expected: set[int]) -> bool:
    for _ in range(200):
        if {place for place, shard in enumerate(shards) if shard.is_here} == expected:
            return True
        time.sleep(0.02)
    return False


def test_shards_are_downloaded_ahead_within_a_share_of_the_cache(
    web: Any, publish: Callable[..., str], tmp_path: Path
) -> None:
    urls = [publish(f"{number}.tar") for number in range(6)]
    size = (web.folder / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 4 * size, PATIENCE)
    indexes = [open_remote_index(url, cache) for url in urls]
    shards = [remote_shard(url, cache) for url in urls]
    with Prefetcher(indexes, lambda step: [step % 6], first_step=0, look_ahead=3) as ahead:
        assert prefetched(shards, {0, 1, 2})  # three quarters of four
        ahead.reached(1)
        assert prefetched(shards, {0, 1, 2, 3})
        for age, shard in enumerate(shards[:4]):
            os.utime(shard.path, (age, age))  # used in turn, not at once by four threads
        ahead.reached(3)
        assert prefetched(shards, {2, 3, 4, 5})
        ahead.reached(4)
        assert prefetched(shards, {0, 3, 4, 5})
    assert web.count(".tar") == 7


def test_what_cannot_be_downloaded_ahead_is_left_to_who_needs_it(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    urls = [publish(f"{number}.tar") for number in range(2)]
    indexes = [open_remote_index(url, cache) for url in urls]
    web.faults["/0.tar"] = [lambda handler, content: handler.send_error(403)]
    with Prefetcher(indexes, lambda step: [step], first_step=0, look_ahead=2):
        assert prefetched([remote_shard(url, cache) for url in urls], {1})


def test_a_cache_smaller_than_the_working_set_is_refused(
    web: Any, publish: Callable[..., str], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 10_000, PATIENCE)
    indexes = [open_remote_index(publish(f"{number}.tar", 16), cache) for number in range(4)]
    order = SampleOrder([16] * 4, seed=0, streams=1, global_batch_size=8)
    with pytest.raises(ConfigError, match="shards that a step draws from on this node; give"):
        look_ahead(Dataset(indexes), order, first_step=0, rank=0, world_size=1)


def steps_of(dataset: Dataset, num_workers: int) -> Iterator[Any]:
    order = SampleOrder(dataset.shard_sizes, seed=0, streams=1, global_batch_size=4)
    return training_batches(
        dataset,
        order,
        transform=TrainTransform(8),
        tokenizer=build_tokenizer("bpe:300", context_length=8, texts=lambda: iter(["caption"])),
        seed=0,
        micro_batch_size=4,
        num_workers=num_workers,
    )


def test_workers_train_on_remote_shards_as_on_local_ones(
    web: Any, publish: Callable[..., str], cache: ShardCache
) -> None:
    urls = [publish(f"{number}.tar", 6) for number in range(3)]
    remote = Dataset([open_remote_index(url, cache) for url in urls])
    assert len(pickle.dumps(remote)) < 4000
    batches = [
        steps_of(open_shards(str(web.folder / "*.tar")), 0),
        steps_of(remote, 2),
    ]
    for _ in range(6):
        local, ours = map(next, batches)
        assert np.array_equal(local.sample_ids, ours.sample_ids)
        assert np.array_equal(local.images, ours.images)
        assert not ours.bad.counts
    for batch in batches:
        batch.close()
    assert web.count(".tar") == 3


@pytest.mark.parametrize(("wait_s", "said"), [(0.01, 0), (1.0, 2)])
def test_a_wait_of_a_second_or_more_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wait_s: float, said: int
) -> None:
    patience = _Even(attempts=3, timeout_s=1.0, wait_s=wait_s)
    with pytest.raises(DataError, match="tried 3 times"):
        fetch("http://127.0.0.1:9/x.tar?key=1", tmp_path / "x", patience=patience)
    line = "http://127.0.0.1:9/x.tar?...: connection refused; trying again in 1 s\n"
    assert capsys.readouterr().err == said * line


class _Even(Patience):
    def wait_before(self, attempt: int) -> float:
        return self.wait_s
