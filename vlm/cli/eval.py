"""`vlm eval MODEL SUITE`: score a model on the tasks of a suite."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.arguments import add_device, add_model

if TYPE_CHECKING:
    from vlm.inference import VisionLanguageModel

HELP = (
    "score a model on the tasks of a suite; each number has n, a 95% interval and chance; under "
    "torchrun, ranks share the work"
)
RANK_TIMEOUT_S = 4 * 3600.0  # ranks wait for each other so long: while rank 0 measures, for one


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
        help="JSON file of results, with a model-card fragment and details beside it; the same "
        "command again measures only what is not there yet, or has changed; default: results.json "
        "of a run folder, where vlm report finds it, else nothing is written",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="pictures at a time (default 64)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the table of results; under torchrun, rank 0 does.

    Raises:
        ConfigError: The suite is wrong, does not fit the model, or the output is another's.
        DataError: Data is missing, damaged, or lacks what a task needs.
        RankFailureError: Another rank died.
    """
    from vlm.errors import ConfigError
    from vlm.runtime import distributed
    from vlm.runtime.device import choose_device
    from vlm.runtime.failures import explain

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size ({args.batch_size}) must be at least 1")
    ranks = distributed.ranks_from_environment()
    device = choose_device(args.device, ranks.local_rank)
    distributed.start(ranks, device, timeout_s=RANK_TIMEOUT_S)
    try:
        _evaluate(args, str(device))
    except BaseException as error:
        told = explain(error, "vlm eval", way_out="give the same command again")
        if told is error:
            raise
        raise told from error
    finally:
        distributed.stop()
    return 0


def _evaluate(args: argparse.Namespace, device: str) -> None:
    from vlm.eval.results import details_folder
    from vlm.eval.suite import evaluate
    from vlm.hub.load import load
    from vlm.runtime import distributed

    is_main = distributed.rank() == 0
    with distributed.agreed():
        model = load(args.model, device=device)
        out, reason = _place(args, model) if is_main else (None, None)
    out_text, reason = distributed.gather_json((out and str(out), reason))[0]
    out = Path(out_text) if out_text else None
    evaluate(model, args.suite, out=out, batch_size=args.batch_size)
    if is_main and out is not None:
        print(f"written: {out}, {out.with_suffix('.md')}, {details_folder(out)}/")
    if is_main and reason is not None:
        print(f"not written: {reason}, and is kept as it is; --out FILE saves these results")


def _place(
    args: argparse.Namespace, model: "VisionLanguageModel"
) -> tuple[Path | None, str | None]:
    """Where results go, or why nothing is written.

    Raises:
        ConfigError: --out holds what these results would not replace.
    """
    from vlm.errors import ConfigError
    from vlm.eval.finished import why_not
    from vlm.eval.suite import load_suite

    out = args.out or _results_of_run(Path(args.model))
    if out is None:
        return None, None
    reason = why_not(out, model, load_suite(args.suite))
    if reason is None:
        return out, None
    if args.out is not None:
        raise ConfigError(f"{reason}; name another --out, or remove it first")
    return None, reason


def _results_of_run(folder: Path) -> Path | None:
    """Where a run's first results go; None where it is no run."""
    return folder / "results.json" if (folder / "config.yaml").is_file() else None
