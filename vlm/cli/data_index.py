"""`vlm data index DATA`: index shards once, and tell what is in them and what is left out."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.arguments import add_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm.data.index_file import ShardIndex

HELP = "index shards, and list their samples and damages; under torchrun, ranks share the work"
MAX_ROWS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    add_data(parser)
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes (1)")
    parser.add_argument(
        "--field",
        metavar="NAME",
        action="append",
        default=[],
        help="a number in the samples' JSON that the index keeps; may be given again",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="a path or URL for all indexes and shards.json, which joins them: name that as DATA",
    )


def run(args: argparse.Namespace) -> int:
    """Indexes, and prints one line a shard and the fingerprint of all."""
    from vlm.curate.indexing import Wanted, index_shards
    from vlm.curate.source import Columns, packed_patterns
    from vlm.curate.store import Store
    from vlm.data.dataset import Dataset
    from vlm.data.findings import left_out, useless
    from vlm.data.joined import is_joined
    from vlm.data.opening import open_indexes
    from vlm.data.patterns import expand
    from vlm.data.shards import default_cache_dir
    from vlm.errors import ConfigError, DataError
    from vlm.runtime.distributed import ranks_from_environment

    if args.workers < 1:
        raise ConfigError(f"--workers ({args.workers}) must be at least 1")
    columns = Columns(args.image_column, args.caption_column)
    if is_joined(args.data):
        raise ConfigError(f"{args.data}: is an index already; name the shards")
    names = expand(packed_patterns(args.data, columns, default_cache_dir()))
    urls = [name for name in names if isinstance(name, str)]
    if urls and args.out:
        raise ConfigError("--out is for local shards; remote ones have their indexes beside them")
    wanted = Wanted(frozenset(args.field), Store(args.out) if args.out else None)
    ranks = ranks_from_environment()
    shards = index_shards(
        [name for name in names if isinstance(name, Path)],
        wanted,
        num_workers=args.workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    if shards is None:
        print(f"rank {ranks.rank} of {ranks.world_size}: done; others are still at work")
        return 0
    if problems := [problem for shard in shards if (problem := useless(shard, needs_images=False))]:
        raise DataError(problems)
    shards = sorted(
        [*shards, *open_indexes(urls, fields=args.field, needs_images=False)], key=lambda s: s.name
    )
    for line in left_out(shards):
        print(line)
    _print_table(shards)
    print(f"fingerprint {Dataset(shards).fingerprint}")
    return 0


def _print_table(shards: "Sequence[ShardIndex]") -> None:
    """One row a shard; of more than `MAX_ROWS`, those from which something was left out."""
    from vlm.config.find import counted

    few = shards if len(shards) <= MAX_ROWS else [shard for shard in shards if shard.rejects]
    rows = [
        ("shard", "samples", "bytes", "left out"),
        *(_row(shard) for shard in few[:MAX_ROWS]),
        (
            counted(len(shards), "shard"),
            str(sum(shard.num_samples for shard in shards)),
            str(sum(shard.size_bytes for shard in shards)),
            str(sum(sum(shard.rejects.values()) for shard in shards)),
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, samples, size, left_out in rows:
        print(f"{name:{widths[0]}}  {samples:>{widths[1]}}  {size:>{widths[2]}}  {left_out}")


def _row(shard: "ShardIndex") -> tuple[str, str, str, str]:
    from vlm.config.find import printable

    left_out = ", ".join(f"{count} {reason}" for reason, count in shard.rejects.items()) or "0"
    return printable(shard.name), str(shard.num_samples), str(shard.size_bytes), left_out
