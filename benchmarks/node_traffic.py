"""How much eight nodes download in an epoch, in data sets: with the real order, caches and server.

    python benchmarks/node_traffic.py   # a minute

Each node is one rank with a cache of its own, too small for the whole data set, and reads every
sample of its slices, step by step, from a server on this machine. The shards are small, and the
order's blocks are small by the same factor: a block is a quarter of the data set, as 65,536 of
262,144 samples would be.
"""

import argparse
import io
import shutil
import tarfile
import tempfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import record

from vlm.data.dataset import Dataset, open_shards
from vlm.data.order import SampleOrder
from vlm.data.shards import open_index

SHARDS, SAMPLES = 128, 64  # of each
GLOBAL_BATCH, BLOCK = 512, 2048
CACHE = 0.4  # of the data set's bytes, on each node


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/node_traffic.json"))
    args = parser.parse_args()
    result: dict[str, Any] = {
        "nodes": args.nodes,
        "epochs": args.epochs,
        "shards": SHARDS,
        "samples": SHARDS * SAMPLES,
        "global_batch_size": GLOBAL_BATCH,
        "cache_share": CACHE,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder))
        for streams in (1, 64):
            ratios = downloads_by_epoch(Path(folder), streams, args.nodes, args.epochs)
            result[f"downloads_by_epoch_streams_{streams}"] = ratios
            print(f"streams={streams}: data sets downloaded, by epoch: {ratios}")
    record("node_traffic", result, args.out, "numpy")


def write_shards(folder: Path) -> None:
    """Indexed shards, pictures followed by random bytes; sizes differ a little, as real ones do."""
    rng, picture = np.random.default_rng(0), smallest_png()
    for number in range(SHARDS):
        path = folder / f"train-{number:04}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key in range(SAMPLES):
                data = picture + rng.bytes(int(rng.integers(400, 1200)) - len(picture))
                info = tarfile.TarInfo(f"{key:04}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        open_index(path)


def smallest_png() -> bytes:
    """What the index takes for a picture, in 100 bytes or less."""
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def downloads_by_epoch(folder: Path, streams: int, nodes: int, epochs: int) -> list[float]:
    """Bytes of shards that the server sent in each epoch, in data sets; nodes keep step."""
    sizes = {f"/{path.name}": path.stat().st_size for path in folder.glob("*.tar")}
    with Server(folder) as server, tempfile.TemporaryDirectory() as caches:
        url = f"http://127.0.0.1:{server.server_port}/train-{{0000..{SHARDS - 1:04}}}.tar"
        datasets = [
            open_shards(
                url,
                Path(caches) / str(node),
                shard_cache_bytes=int(CACHE * sum(sizes.values())),
            )
            for node in range(nodes)
        ]
        totals = [0]
        in_step = threading.Barrier(
            nodes,
            lambda: totals.append(sum(sizes.get(path, 0) * n for path, n in server.sent.items())),
        )
        threads = [
            threading.Thread(target=read, args=(dataset, streams, node, nodes, epochs, in_step))
            for node, dataset in enumerate(datasets)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shutil.rmtree(caches, ignore_errors=True)
    return [round((end - begin) / sum(sizes.values()), 3) for begin, end in pairwise(totals)]


def read(
    dataset: Dataset,
    streams: int,
    node: int,
    nodes: int,
    epochs: int,
    in_step: threading.Barrier,
) -> None:
    order = SampleOrder(
        dataset.shard_sizes,
        seed=0,
        streams=streams,
        global_batch_size=GLOBAL_BATCH,
        block_size=BLOCK // streams,
    )
    steps = len(dataset) // GLOBAL_BATCH  # an epoch; it comes out even
    for step in range(epochs * steps):
        for sample_id in order.batch(step, rank=node, world_size=nodes)[1]:
            dataset.read(sample_id)
        if (step + 1) % steps == 0:
            in_step.wait()


class Server(ThreadingHTTPServer):
    """Serves a folder and counts what it sent."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.sent: Counter[str] = Counter()

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(SimpleHTTPRequestHandler):
    """Counts instead of writing lines."""

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Called once a request."""
        self.server.sent[self.path] += 1  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
