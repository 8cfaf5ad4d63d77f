"""`vlm data index DATA`: index shards once, and tell what is in them and what is left out."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.data.shards import ShardIndex

HELP = "index shards, and list their samples and damages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    parser.add_argument("data", metavar="DATA", help="shards, an image folder or a table")
    parser.add_argument("--image-column", metavar="NAME", help="of a table; guessed if not given")
    parser.add_argument("--caption-column", metavar="NAME", help="of a table; guessed if not given")


def run(args: argparse.Namespace) -> int:
    """Indexes, and prints one line a shard and the fingerprint of all."""
    from vlm.curate.source import open_data

    dataset = open_data(
        args.data, image_column=args.image_column, caption_column=args.caption_column
    )
    rows = [_row(shard) for shard in dataset.shards]
    size_bytes = sum(shard.size_bytes for shard in dataset.shards)
    rejects = sum(dataset.rejects.values())
    rows = [
        ("shard", "samples", "bytes", "left out"),
        *rows,
        (f"{len(rows)} shards", str(len(dataset)), str(size_bytes), str(rejects)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, samples, size, left_out in rows:
        print(f"{name:{widths[0]}}  {samples:>{widths[1]}}  {size:>{widths[2]}}  {left_out}")
    print(f"fingerprint {dataset.fingerprint}")
    return 0


def _row(shard: "ShardIndex") -> tuple[str, str, str, str]:
    from vlm.config.find import printable

    counts = [f"{found.count} {reason}" for reason, found in shard.rejects.items()]
    left_out = ", ".join(counts) or "0"
    return printable(shard.name), str(shard.num_samples), str(shard.size_bytes), left_out
