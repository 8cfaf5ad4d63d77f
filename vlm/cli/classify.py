"""`vlm classify MODEL DATA --labels a,b`: name what pictures show, as CSV."""

import argparse
import sys
from functools import partial
from pathlib import Path

from vlm.cli.arguments import add_data, add_device, add_model, data_options

HELP = "name what pictures show: CSV with the likeliest labels of each"
TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    add_data(parser, "shards, an image folder, a table or an image")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B", help="the labels to choose from")
    labels.add_argument(
        "--labels-file",
        metavar="NAME|FILE",
        help="imagenet, cifar10, cifar100, or a file with one a line",
    )
    parser.add_argument(
        "--templates",
        default="simple",
        metavar="NAME|FILE",
        help="none, simple (default), cifar, openai, openai_simple, or a file with one {} a line",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="CSV file (default: print it)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Classify, batch by batch.

    Raises:
        ConfigError: The labels or templates are wrong, or the output exists.
        DataError: The data cannot be read.
    """
    from vlm.heads.class_names import resolve_class_names
    from vlm.heads.zero_shot import zero_shot_classifier
    from vlm.hub.load import load
    from vlm.retrieval.embed import pictures_of
    from vlm.retrieval.tables import new_csv, refuse_existing

    refuse_existing(args.out)
    names = [name.strip() for name in (args.labels or "").split(",")]
    labels = resolve_class_names(args.labels_file or names)
    model = load(args.model, device=args.device)
    classifier = zero_shot_classifier(model, labels, args.templates)
    batches = pictures_of(
        model,
        args.data,
        **data_options(args),
        description="classifying",
        log=partial(print, file=sys.stderr),
    )
    header = ["key", "path", "label", "probability", *_columns(min(TOP, len(labels)))]
    with new_csv(args.out, header) as write:
        for batch in batches:
            features = model.encode_pixels(batch.images).float().cpu()
            found = classifier.predict(features, logit_scale=model.logit_scale, top=TOP)
            for item, prediction in zip(batch.items, found, strict=True):
                cells = [cell for name, p in prediction.ranking for cell in (name, f"{p:.6f}")]
                write([item.key, item.path, *cells])
    return 0


def _columns(num_ranked: int) -> list[str]:
    return [f"{name}_{n}" for n in range(2, num_ranked + 1) for name in ("label", "probability")]
