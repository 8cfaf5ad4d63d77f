"""`vlm index MODEL DATA INDEX`: embed pictures into a searchable folder."""

import argparse
import sys
from functools import partial
from pathlib import Path

from vlm.cli.arguments import add_data, add_device, add_model, data_options

HELP = "embed pictures into a searchable folder, with the model inside"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    add_data(parser)
    parser.add_argument("index", metavar="INDEX", type=Path, help="folder to write; new or empty")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Build the index.

    Raises:
        ConfigError: The folder holds something.
        DataError: The data cannot be read.
        DiskError: The folder cannot be written.
    """
    from vlm.config.find import counted
    from vlm.curate.source import open_data
    from vlm.hub.load import load
    from vlm.retrieval.index import Index, check_new

    check_new(args.index)
    log = partial(print, file=sys.stderr)
    model = load(args.model, device=args.device)
    dataset = open_data(args.data, **data_options(args), log=log)
    index = Index.build(model, dataset, args.index, log=log)
    pictures = counted(len(index), "picture")
    print(f"{args.index}: {pictures}; fields to filter by: {', '.join(index.fields)}")
    return 0
