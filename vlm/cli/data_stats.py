"""`vlm data stats DATA`: what a data set consists of, as a table and as a picture."""

import argparse

from vlm.cli.arguments import add_data, png

HELP = "count sizes, formats, lengths of captions, scripts and exact duplicates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    add_data(parser)
    parser.add_argument("--out", metavar="PNG", type=png, help="also draw it")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a line a fact, and draws."""
    from vlm.curate.source import open_data
    from vlm.curate.stats import lines, measure

    dataset = open_data(
        args.data, image_column=args.image_column, caption_column=args.caption_column
    )
    stats = measure(dataset)
    for name, says in lines(stats):
        print(f"{name:<10}{says}")
    if args.out is not None:
        from vlm.curate.stats_plot import plot

        plot(stats, args.out, title=args.data)
        print(f"drawn in {args.out}")
    return 0
