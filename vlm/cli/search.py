"""`vlm search INDEX QUERY`: find pictures by a text or by a picture."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.arguments import add_device

if TYPE_CHECKING:
    from vlm.retrieval.index import Hit

HELP = "find the pictures nearest to a text, or to the picture in an image file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("index", metavar="INDEX", help="a folder that `vlm index` wrote")
    parser.add_argument("query", metavar="QUERY", help="a text, or the path of an image file")
    parser.add_argument("-k", type=int, default=10, help="how many pictures (default 10)")
    parser.add_argument(
        "--where",
        metavar="EXPR",
        help="which pictures, by metadata: 'label == \"cat\" and year >= 2019'",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a page with thumbnails"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Search, and print the hits, best first.

    Raises:
        ConfigError: No such index, a wrong query or filter, or the page exists.
        DataError: A file of the index is missing or damaged.
    """
    from vlm.data.grouping import IMAGE_SUFFIXES
    from vlm.errors import ConfigError
    from vlm.retrieval.embed import is_image_file
    from vlm.retrieval.index import Index
    from vlm.retrieval.page import search_page
    from vlm.retrieval.tables import refuse_existing, write_new

    refuse_existing(args.html)
    is_picture = is_image_file(args.query)
    if not is_picture and Path(args.query).suffix.lower().lstrip(".") in IMAGE_SUFFIXES:
        raise ConfigError(f"no such picture: {args.query}")
    index = Index.open(args.index, device=args.device)
    hits = index.search(Path(args.query) if is_picture else args.query, args.k, args.where)
    if args.html is not None:
        write_new(args.html, search_page(args.query, hits, where=args.where))
    _print_json(hits) if args.json else _print_table(hits)
    return 0


def _print_json(hits: "list[Hit]") -> None:
    import json

    names = ("key", "score", "caption", "meta")
    rows = [{name: getattr(hit, name) for name in names} for hit in hits]
    print(json.dumps(rows, indent=1, ensure_ascii=False))


def _print_table(hits: "list[Hit]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlm.config.find import printable

    if not hits:
        print("no picture matches")
        return
    table = Table("", "score", "picture", "caption", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, hit in enumerate(hits, start=1):
        # Text and printable: a caption's brackets are no markup, its control codes no commands.
        texts = (Text(printable(text, 200)) for text in (hit.path or hit.key, hit.caption))
        table.add_row(str(number), f"{hit.score:.3f}", *texts)
    Console().print(table)
