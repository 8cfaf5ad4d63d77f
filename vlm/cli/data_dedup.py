"""`vlm data dedup DATA`: find pictures that repeat, and show them side by side."""

import argparse
from typing import TYPE_CHECKING

from vlm.cli.arguments import png

if TYPE_CHECKING:
    from vlm.data.dataset import Dataset

HELP = "find pictures that repeat; nothing is rewritten: training leaves them out by `dedup:`"
MAX_GROUPS, MAX_MEMBERS, MAX_ROWS = 10, 5, 50  # printed groups and their samples, drawn groups


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    parser.add_argument("data", metavar="DATA", help="shards, an image folder or a table")
    parser.add_argument(
        "--perceptual",
        action="store_true",
        help="find pictures that look alike too; the first time, each is decoded",
    )
    parser.add_argument(
        "--threshold",
        metavar="BITS",
        type=int,
        help="with --perceptual: so many of 64 bits may differ, up to 10 (4)",
    )
    parser.add_argument("--out", metavar="PNG", type=png, help="draw the groups side by side")
    parser.add_argument("--image-column", metavar="NAME", help="of a table; guessed if not given")
    parser.add_argument("--caption-column", metavar="NAME", help="of a table; guessed if not given")


def run(args: argparse.Namespace) -> int:
    """Prints how many samples repeat another one, and the first groups."""
    from vlm.config.find import counted
    from vlm.curate.dedup import exact_firsts, groups, perceptual_firsts, perceptual_hashes
    from vlm.curate.show import write_sheet
    from vlm.curate.source import open_data

    bits = _threshold(args)
    dataset = open_data(
        args.data, image_column=args.image_column, caption_column=args.caption_column
    )
    found = groups(exact_firsts(dataset.image_hashes()))
    rule = "the same bytes"
    _print_groups(rule, dataset, found)
    if args.perceptual:
        found = groups(perceptual_firsts(perceptual_hashes(dataset), max_bits=bits))
        rule = f"alike, at most {bits} of 64 bits differ"
        _print_groups(rule, dataset, found)
    kind = "Perceptual" if args.perceptual else "Exact"
    if args.out is not None and found:
        write_sheet(dataset, args.out, found[:MAX_ROWS], title=f"{kind} repeats: {rule}")
        print(f"{args.out}: {min(MAX_ROWS, len(found))} of {counted(len(found), 'group')}")
    return 0


def _threshold(args: argparse.Namespace) -> int:
    from vlm.errors import ConfigError

    if args.threshold is None:
        return 4
    if not args.perceptual:
        raise ConfigError("--threshold does nothing without --perceptual")
    if not 0 <= args.threshold <= 10:
        raise ConfigError(f"--threshold ({args.threshold}) must be from 0 to 10")
    return int(args.threshold)


def _print_groups(what: str, dataset: "Dataset", found: list[list[int]]) -> None:
    from vlm.config.find import counted

    repeats = sum(len(group) - 1 for group in found)
    print(f"{what}: {repeats:,} of {counted(len(dataset), 'sample')} repeat one of {len(found):,}")
    for group in found[:MAX_GROUPS]:
        names = [dataset.name(sample_id) for sample_id in group[:MAX_MEMBERS]]
        print("  " + " = ".join(names) + " = ..." * (len(group) > MAX_MEMBERS))
    if len(found) > MAX_GROUPS:
        print(f"  and {len(found) - MAX_GROUPS:,} more")
