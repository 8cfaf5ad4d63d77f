"""`vlm checkpoint list RUN`: what checkpoints a run has, without reading their tensors."""

import argparse
from pathlib import Path

HELP = "list a run's checkpoints: step, size, time, metric, and whether all files are there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    print_table(args.run, hashes=False)
    return 0


def print_table(run: Path, *, hashes: bool) -> list[str | None]:
    """Prints a line for each checkpoint, oldest first.

    Args:
        run: The run's folder.
        hashes: Whether to read all bytes, or names and sizes alone.

    Returns:
        What is wrong with each; None where nothing is.

    Raises:
        ConfigError: There is no such folder.
        CheckpointError: It has no checkpoints.
    """
    from datetime import UTC, datetime

    from vlm import checkpoint
    from vlm.errors import CheckpointError, ConfigError

    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give a run folder")
    paths = checkpoint.list_checkpoints(run / "checkpoints")
    if not paths:
        raise CheckpointError(f"{run} has no checkpoints")
    metrics = [checkpoint.read_metric(path) or {"rule": None, "value": None} for path in paths]
    best = checkpoint.best(run / "checkpoints", metrics[-1]["rule"])
    problems = []
    print(f"{'step':>9}  {'MiB':>9}  {'saved (UTC)':<19}  files")
    for path, metric in zip(paths, metrics, strict=True):
        problems.append(checkpoint.verify(path, hashes=hashes))
        size = sum(file.stat().st_size for file in path.iterdir())
        saved = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S")
        files = problems[-1] or ("verified" if hashes else "all there")
        value = "" if metric["value"] is None else f"; {metric['rule']} {metric['value']:.6g}"
        step = int(path.name.removeprefix("step-"))
        print(
            f"{step:>9}  {size / 2**20:>9.1f}  {saved}  {files}{value}"
            f"{' (best)' if path == best else ''}"
        )
    return problems
