"""`vlm data check DATA`: read every byte again, and tell what is wrong; then the exit code is 3."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.arguments import add_data

if TYPE_CHECKING:
    from vlm.curate.check import Report

HELP = "read every byte again, and tell all that is wrong"
NUM_EXAMPLES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    add_data(parser)
    parser.add_argument("--decode", action="store_true", help="decode every picture too")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes (1)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write a report as JSON")


def run(args: argparse.Namespace) -> int:
    """Checks, prints a row a reason; returns 0 if all is well, else a `DataError`'s code."""
    import json

    from vlm.curate.check import check
    from vlm.curate.source import Columns, packed_patterns
    from vlm.data.shards import default_cache_dir
    from vlm.errors import ConfigError, DataError
    from vlm.runtime.files import write_atomic

    if args.workers < 1:
        raise ConfigError(f"--workers ({args.workers}) must be at least 1")
    columns = Columns(args.image_column, args.caption_column)
    patterns = packed_patterns(args.data, columns, default_cache_dir())
    report = check(patterns, decode=args.decode, num_workers=args.workers)
    if args.json is not None:
        content = {"data": args.data, "decoded": args.decode, **report.to_json()}
        write_atomic(args.json, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
    _print(report, decoded=args.decode)
    return DataError.exit_code if report.counts else 0


def _print(report: "Report", *, decoded: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlm.config.find import counted, printable

    if report.counts:
        table = Table("reason", "count", "examples", box=box.SIMPLE_HEAD, pad_edge=False)
        for reason, count in sorted(report.counts.items(), key=lambda item: -item[1]):
            cases = [printable(str(case), 200) for case in report.cases[reason][:NUM_EXAMPLES]]
            # Text: the brackets of a key are no markup
            table.add_row(reason, str(count), Text("\n".join(cases), overflow="fold"))
        Console().print(table)
    found = counted(sum(report.counts.values()), "problem") if report.counts else "nothing wrong"
    print(
        f"{counted(report.num_shards, 'shard')}, {counted(report.num_samples, 'sample')}, "
        f"{counted(report.size_bytes, 'byte')} read{' and decoded' if decoded else ''}: {found}"
    )
