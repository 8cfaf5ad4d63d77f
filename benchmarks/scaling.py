"""The data order at web scale: its real code, asked by the ranks of a cluster that is not there.

    python benchmarks/scaling.py          # 5 billion samples, 1,024 ranks; a few minutes
    python benchmarks/scaling.py --table  # the table of docs/scaling.md, from the JSON

Only `vlm/data/order.py` runs: no shard exists. What a node would read follows from the sample ids
that its ranks are given, at the sizes that the command names.
"""

import argparse
import json
import pickle
import resource
import statistics
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from vlm.data.index_file import RECORD
from vlm.data.order import SampleOrder

RESULT = Path("benchmarks/results/scaling.json")
STREAMS = (1, 64, 1024)
KEY_BYTES = 9  # img2dataset's keys
MIB, TB = 2**20, 10**12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5_000_000_000)
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--sample-bytes", type=int, default=25_000, help="picture and text")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--global-batch-size", type=int, default=131_072)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of the result")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text())))
        return
    sizes = shard_sizes(args.samples, args.samples_per_shard)
    result = {
        **cluster(args, len(sizes)),
        "orders": [measured(args, sizes, streams) for streams in STREAMS],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(table(result))
    record("scaling", result, args.out, "numpy")


def shard_sizes(samples: int, mean: int) -> np.ndarray:
    """Uneven sizes, within a tenth of the mean, that add up."""
    sizes = np.random.default_rng(0).integers(mean * 9 // 10, mean * 11 // 10, samples // mean)
    sizes[-1] += samples - sizes.sum()
    if sizes[-1] < 0:
        sizes[sizes.argmax()] += sizes[-1]
        sizes[-1] = 0
    assert sizes.min() >= 0
    return sizes


def cluster(args: argparse.Namespace, num_shards: int) -> dict[str, Any]:
    """What follows from the sizes alone."""
    nodes = args.ranks // args.ranks_per_node
    return {
        "samples": args.samples,
        "shards": num_shards,
        "shard_bytes": args.samples_per_shard * args.sample_bytes,
        "data_tb": args.samples * args.sample_bytes / TB,
        "index_bytes_per_sample": RECORD.itemsize + KEY_BYTES,
        "index_tb": args.samples * (RECORD.itemsize + KEY_BYTES) / TB,
        "ranks": args.ranks,
        "nodes": nodes,
        "global_batch_size": args.global_batch_size,
        "steps_per_epoch": args.samples // args.global_batch_size,
        "read_mb_per_node_and_step": args.global_batch_size / nodes * args.sample_bytes / 1e6,
    }


def measured(args: argparse.Namespace, sizes: np.ndarray, streams: int) -> dict[str, Any]:
    """Restore time, memory, and what a node meets, for one number of streams."""

    def order() -> SampleOrder:
        size = args.global_batch_size
        return SampleOrder(sizes, seed=0, streams=streams, global_batch_size=size)

    steps = np.random.default_rng(1).integers(0, 3 * args.samples // args.global_batch_size, 9)
    restores, batches = [], []
    for step in steps.tolist():
        started = time.perf_counter()
        fresh = order()
        fresh.batch(step, rank=args.ranks // 3, world_size=args.ranks)
        restores.append(time.perf_counter() - started)
        for number in range(1, 5):
            started = time.perf_counter()
            fresh.batch(step + number, rank=args.ranks // 3, world_size=args.ranks)
            batches.append(time.perf_counter() - started)
    return {
        "streams": streams,
        "block_size": fresh.block_size,
        "restore_ms": statistics.median(restores) * 1e3,
        "next_batch_ms": statistics.median(batches) * 1e3,
        "memory_mib": memory_mib(order, args.ranks),
        "pickle_mib": len(pickle.dumps(fresh)) / MIB,
        **node_reads(args, order(), steps[0].item()),
    }


def memory_mib(make: Any, ranks: int) -> float:
    """The most that an order takes in one rank, over the steps of two blocks."""
    tracemalloc.start()
    order = make()
    for step in range(1000, 1016):
        order.batch(step, rank=ranks // 3, world_size=ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / MIB


def node_reads(args: argparse.Namespace, order: SampleOrder, first_step: int) -> dict[str, float]:
    """Shards a node has open while a block lasts, and how fast it meets new ones.

    All steps are of one epoch. The rate is that of the later half, when the first block is through.
    """
    nodes, num_steps = args.ranks // args.ranks_per_node, 384
    per_block = max(1, order.block_size * order.streams // args.global_batch_size)
    ends = np.cumsum(order.shard_sizes)
    first_step -= first_step % per_block
    open_shards, rates = [], []
    for node in (0, nodes // 3, nodes - 1):
        met = [
            np.unique(
                np.searchsorted(
                    ends,
                    order.batch(first_step + step, rank=node, world_size=nodes)[1],
                    side="right",
                )
            )
            for step in range(num_steps)
        ]
        blocks = [met[i : i + per_block] for i in range(0, num_steps, per_block)]
        open_shards += [len(np.unique(np.concatenate(block))) for block in blocks]
        seen = [len(np.unique(np.concatenate(met[:n]))) for n in (num_steps // 2, num_steps)]
        rates += [(more - less) / (num_steps // 2) for less, more in pairwise(seen)]
    new = statistics.mean(rates)
    steps_per_epoch = args.samples / args.global_batch_size
    return {
        "open_shards_per_node": statistics.median(open_shards),
        "new_shards_per_node_and_step": new,
        "fetched_mb_per_node_and_step": new * args.samples_per_shard * args.sample_bytes / 1e6,
        "share_of_shards_per_node_and_epoch": min(1.0, new * steps_per_epoch / len(ends)),
    }


def table(result: dict[str, Any]) -> str:
    """The orders as a Markdown table."""
    rows = [
        ("`data.streams`", lambda o: f"{o['streams']:,}"),
        ("samples a block", lambda o: f"{o['block_size']:,}"),
        ("restore at any position, ms", lambda o: f"{o['restore_ms']:.0f}"),
        ("the next batch, ms", lambda o: f"{o['next_batch_ms']:.1f}"),
        ("memory a rank, MiB", lambda o: f"{o['memory_mib']:.0f}"),
        ("sent to each loader worker, MiB", lambda o: f"{o['pickle_mib']:.1f}"),
        ("shards open a node", lambda o: f"{o['open_shards_per_node']:,.0f}"),
        ("new shards a node and step", lambda o: f"{o['new_shards_per_node_and_step']:.2f}"),
        ("fetched a node and step, MB", lambda o: f"{o['fetched_mb_per_node_and_step']:,.0f}"),
        (
            "share of all shards a node fetches an epoch",
            lambda o: f"{o['share_of_shards_per_node_and_epoch']:.1%}",
        ),
    ]
    orders = result["orders"]
    lines = [[name, *(show(order) for order in orders)] for name, show in rows]
    lines.insert(1, ["---"] + ["---:"] * len(orders))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
