"""The arguments that several verbs share, declared once."""

import argparse
from pathlib import Path
from typing import TypedDict


class DataOptions(TypedDict):
    """The columns that were named, as `open_data` and others take them."""

    image_column: str | None
    caption_column: str | None


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL."""
    parser.add_argument("model", metavar="MODEL", help="run folder or model folder")


def add_data(
    parser: argparse.ArgumentParser, what: str = "shards, an image folder or a table"
) -> None:
    """DATA, and the columns of a table; `data_options` hands the latter on."""
    parser.add_argument("data", metavar="DATA", help=what)
    parser.add_argument("--image-column", metavar="NAME", help="of a table; guessed if not given")
    parser.add_argument(
        "--caption-column",
        metavar="NAME",
        help="of a table, several with commas between; guessed if not given",
    )


def data_options(args: argparse.Namespace) -> DataOptions:
    """How DATA is to be read, out of the command's arguments."""
    return {"image_column": args.image_column, "caption_column": args.caption_column}


def png(text: str) -> Path:
    """The path of a picture to write, for argparse: only PNG is written."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: a PNG is written; name it .png")
    return Path(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
