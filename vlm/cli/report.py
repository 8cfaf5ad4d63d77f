"""`vlm report RUN`: a run folder as one HTML page."""

import argparse
from pathlib import Path

HELP = "write a run's results, curves and galleries as one self-contained HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument(
        "--out", metavar="HTML", type=Path, help="the page to write (RUN/report.html)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page, and says where it is and how large."""
    from vlm.report.page import write_report

    path = write_report(args.folder, args.out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
