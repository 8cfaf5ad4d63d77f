"""`vlm eval MODEL SUITE`: score a model on the tasks of a suite."""

import argparse
from pathlib import Path

from vlm.cli.arguments import add_device, add_model

HELP = "score a model on the tasks of a suite; each number has n, a 95% interval and chance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="YAML file with a list of tasks, or the name of a shipped one",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="JSON file of results, details beside it; default: results.json of a run folder that "
        "has none yet, where vlm report finds it, else nothing is written",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="pictures at a time (default 64)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the table of results.

    Raises:
        ConfigError: The suite is wrong, does not fit the model, or the output exists.
        DataError: Data is missing, damaged, or lacks what a task needs.
    """
    from vlm.errors import ConfigError
    from vlm.eval.suite import details_folder, evaluate
    from vlm.retrieval.tables import refuse_existing

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size ({args.batch_size}) must be at least 1")
    refuse_existing(args.out)
    of_run = _results_of_run(Path(args.model))
    kept = args.out is None and of_run is not None and of_run.exists()
    out = None if kept else args.out or of_run
    evaluate(args.model, args.suite, out=out, device=args.device, batch_size=args.batch_size)
    if out is not None:
        print(f"written: {out}, {details_folder(out)}/")
    if kept:
        print(f"not written: {of_run} is kept as it is; --out FILE saves these results")
    return 0


def _results_of_run(folder: Path) -> Path | None:
    """Where a run's first results go; None where it is no run."""
    return folder / "results.json" if (folder / "config.yaml").is_file() else None
