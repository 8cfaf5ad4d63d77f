"""`vlm caption MODEL DATA`: describe pictures, as CSV."""

import argparse
import sys
from functools import partial
from pathlib import Path

from vlm.cli.arguments import add_data, add_device, add_model, data_options

HELP = "describe pictures: CSV with a caption for each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    add_data(parser, "shards, an image folder, a table or an image")
    parser.add_argument("--prompt", metavar="TEXT", help="how each caption begins")
    parser.add_argument("--out", metavar="FILE", type=Path, help="CSV file (default: print it)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Caption, batch by batch.

    Raises:
        ConfigError: The model has no captioner, or the output exists.
        DataError: The data cannot be read.
    """
    from vlm.errors import ConfigError
    from vlm.hub.load import load
    from vlm.retrieval.embed import pictures_of
    from vlm.retrieval.tables import new_csv, refuse_existing

    refuse_existing(args.out)
    model = load(args.model, device=args.device)
    if model.model.captioner is None:
        raise ConfigError(
            f"{args.model}: this model has no captioner; train one: "
            "vlm train CONFIG model.captioner.width=256"
        )
    batches = pictures_of(
        model,
        args.data,
        **data_options(args),
        description="captioning",
        log=partial(print, file=sys.stderr),
    )
    with new_csv(args.out, ["key", "path", "caption"]) as write:
        for batch in batches:
            captions = model.caption_pixels(batch.images, prompt=args.prompt)
            for item, caption in zip(batch.items, captions, strict=True):
                write([item.key, item.path, caption])
    return 0
