"""`vlm data scenes OUT`: compose pictures of several objects, with captions and questions."""

import argparse
from pathlib import Path

HELP = "compose pictures of several objects, with captions, questions and held-out combinations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--data",
        metavar="DATA",
        default="datasets/emoji/train-*.tar",
        help='drawings of objects on white, each with its "label" (%(default)s)',
    )
    parser.add_argument(
        "--objects",
        metavar="FILE",
        default="objects",
        help="YAML list of the objects, or the name of a shipped one (%(default)s)",
    )
    parser.add_argument(
        "--num-train",
        metavar="N",
        type=int,
        default=20_000,
        help="scenes to train on (%(default)s)",
    )
    parser.add_argument(
        "--num-heldout",
        metavar="N",
        type=int,
        default=1000,
        help="scenes of val, test_combination and test_object each (%(default)s)",
    )
    parser.add_argument(
        "--image-size", metavar="PX", type=int, default=64, help="side of a picture (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which scenes (%(default)s)")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1, help="processes; same bytes (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Composes, and prints how many scenes each split has."""
    from vlm.config.find import counted
    from vlm.curate.scenes import Recipe, make_scenes
    from vlm.errors import ConfigError

    if args.workers < 1:
        raise ConfigError(f"--workers ({args.workers}) must be at least 1")
    report = make_scenes(
        args.out,
        Recipe(args.data, args.objects, args.image_size, args.seed),
        num_train=args.num_train,
        num_heldout=args.num_heldout,
        num_workers=args.workers,
    )
    sizes = ", ".join(f"{size:,} {split}" for split, size in report["num_scenes"].items())
    known, unseen = len(report["objects"]), len(report["unseen"])
    print(
        f"{args.out}: {sizes}; {known} objects and {unseen} unseen ones "
        f"by {counted(len(report['artists']), 'artist')}"
    )
    return 0
