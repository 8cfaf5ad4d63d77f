"""`vlm data pack DATA OUT`: an image folder or a table becomes WebDataset shards."""

import argparse
from pathlib import Path

from vlm.cli.arguments import add_data

HELP = "write an image folder or a table as shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    add_data(parser, "an image folder, or a CSV, TSV, JSONL or Parquet table")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--shard-size-mb", metavar="MB", type=int, default=256, help="largest shard (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Packs, and prints what was left out."""
    from vlm.config.find import counted
    from vlm.curate.pack import pack
    from vlm.curate.source import Columns, find_source, shard_patterns
    from vlm.data.tally import Tally
    from vlm.errors import ConfigError

    if args.shard_size_mb < 1:
        raise ConfigError(f"--shard-size-mb ({args.shard_size_mb}) must be at least 1")
    if shard_patterns(args.data) is not None:
        raise ConfigError(
            f"{args.data}: is no image folder and no table; shards are packed already"
        )
    source = find_source(args.data, Columns(args.image_column, args.caption_column))
    report = pack(source.listing(), args.out, shard_size_bytes=args.shard_size_mb << 20)
    for line in Tally(**report["skipped"]).lines():
        print(f"{source.name}: left out {line}")
    samples, shards = report["num_samples"], report["num_shards"]
    print(f"{args.out}: {counted(samples, 'sample')} in {counted(shards, 'shard')}")
    return 0
