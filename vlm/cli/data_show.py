"""`vlm data show DATA --out sheet.png`: a contact sheet of pictures and captions."""

import argparse

from vlm.cli.arguments import add_data, data_options, png

HELP = "draw a contact sheet of samples with their captions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    add_data(parser)
    parser.add_argument("--out", metavar="PNG", type=png, required=True, help="the sheet to write")
    parser.add_argument("--n", type=int, default=32, help="how many samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which samples (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Draws the sheet."""
    from vlm.config.find import counted
    from vlm.curate.show import contact_sheet
    from vlm.curate.source import open_data
    from vlm.errors import ConfigError

    if args.n < 1 or args.seed < 0:
        raise ConfigError("--n must be at least 1 and --seed at least 0")
    dataset = open_data(args.data, **data_options(args))
    drawn = contact_sheet(dataset, args.out, n=args.n, seed=args.seed)
    print(f"{args.out}: {drawn} of {counted(len(dataset), 'sample')}")
    return 0
