"""`vlm caption MODEL DATA`: describe pictures, or answer a question about each, as CSV."""

import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from vlm.cli.arguments import add_data, add_device, add_model, data_options

HELP = "describe pictures, or answer a question about each: CSV with a text for each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    add_data(parser, "shards, an image folder, a table or an image")
    parser.add_argument("--prompt", metavar="TEXT", help="what the text goes on from; a question")
    _add_decoding(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, help="CSV file (default: print it)")
    add_device(parser)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how tokens are chosen (default: the likeliest each time)")
    group.add_argument("--num-beams", metavar="N", type=int, default=1, help="beam search")
    group.add_argument(
        "--length-penalty", metavar="X", type=float, default=1.0, help="of beams; above 1: longer"
    )
    group.add_argument(
        "--no-repeat-ngram", metavar="N", type=int, default=0, help="no N tokens occur twice"
    )
    group.add_argument("--top-p", metavar="P", type=float, help="draw from the nucleus of P")
    group.add_argument("--temperature", metavar="T", type=float, default=1.0, help="of drawing")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of drawing")
    group.add_argument("--max-length", metavar="N", type=int, help="in tokens, prompt included")


def run(args: argparse.Namespace) -> int:
    """Caption, batch by batch.

    Raises:
        ConfigError: The model has no captioner, or the output exists.
        DataError: The data cannot be read.
    """
    from vlm.errors import ConfigError
    from vlm.heads.generate import Decoding
    from vlm.hub.load import load
    from vlm.retrieval.embed import pictures_of
    from vlm.retrieval.tables import new_csv, refuse_existing

    refuse_existing(args.out)
    decoding = Decoding(**{field.name: getattr(args, field.name) for field in fields(Decoding)})
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
            captions = model.caption_pixels(batch.images, prompt=args.prompt, decoding=decoding)
            for item, caption in zip(batch.items, captions, strict=True):
                write([item.key, item.path, caption])
    return 0
