"""`vlm index MODEL DATA INDEX`: embed pictures into a searchable folder."""

import argparse
import sys
from functools import partial
from pathlib import Path

HELP = "embed pictures into a searchable folder, with the model inside"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="run folder or model folder")
    parser.add_argument("data", metavar="DATA", help="shards, an image folder or a table")
    parser.add_argument("index", metavar="INDEX", type=Path, help="folder to write; new or empty")
    parser.add_argument("--image-column", metavar="NAME", help="of a table; guessed if not given")
    parser.add_argument("--caption-column", metavar="NAME", help="of a table; guessed if not given")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")


def run(args: argparse.Namespace) -> int:
    """Build the index.

    Raises:
        ConfigError: The folder holds something.
        DataError: The data cannot be read.
        DiskError: The folder cannot be written.
    """
    from vlm.curate.source import open_data
    from vlm.hub.load import load
    from vlm.retrieval.index import Index, check_new

    check_new(args.index)
    log = partial(print, file=sys.stderr)
    model = load(args.model, device=args.device)
    dataset = open_data(
        args.data, image_column=args.image_column, caption_column=args.caption_column, log=log
    )
    index = Index.build(model, dataset, args.index, log=log)
    print(f"{args.index}: {len(index):,} pictures; fields to filter by: {', '.join(index.fields)}")
    return 0
