"""`vlm checkpoint verify RUN`: compares every byte of a run's checkpoints with their manifests."""

import argparse

from vlm.cli.checkpoint_list import add_arguments, print_table

__all__ = ["HELP", "add_arguments", "run"]
HELP = "compare a run's checkpoints with their manifests; exit code 5 if the newest is damaged"


def run(args: argparse.Namespace) -> int:
    """Prints the table and says whether the newest can be used."""
    from vlm.errors import CheckpointError

    problems = print_table(args.run, hashes=True)
    if problems[-1] is not None:
        sound = sum(problem is None for problem in problems)
        way_out = (
            "vlm train --resume auto continues from the newest sound one"
            if sound
            else "start anew with another run.dir"
        )
        raise CheckpointError(
            f"{args.run}: the newest checkpoint is damaged: {problems[-1]}; "
            f"{sound} of {len(problems)} are sound; {way_out}"
        )
    return 0
