"""The linear probe against scikit-learn's best, on the same features of emoji.

    python benchmarks/probe.py                  # of runs/emoji, a few minutes on two cores
    python benchmarks/probe.py MODEL            # any SPEC

Fitted to the training shards, lambda chosen on a fifth of them, measured on `val_artist`. Of
scikit-learn's LogisticRegression there are two figures over a grid of every decade of C: of the C
that the same fifth chooses, and, which no one may do, of the one that is best on `val_artist`.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm.runtime import torchvision_guard

torchvision_guard.install()
from record import record
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from vlm.data.dataset import open_shards
from vlm.eval.probes import Named, knn, named, probe, split
from vlm.eval.source import Source
from vlm.hub.load import load

TEST, TRAIN = "datasets/emoji/val_artist-*.tar", "datasets/emoji/train-*.tar"
GRID = tuple(10.0**exponent for exponent in range(-3, 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="runs/emoji")
    parser.add_argument("--label", default="label")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/probe.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # CLIP's 1,000 steps are the limit
    source = Source(load(args.model), open_shards(TEST), log=lambda _: None)
    train = source.beside(TRAIN)
    seconds = {"embedding": clock(lambda: (source.embedded, train.embedded))[0]}
    seconds["ours"], ours = clock(lambda: probe(source, train, label=args.label))
    print(f"ours: {ours.rows[0].value:.4f}, C = {1 / ours.details['l2']:.4g}", flush=True)
    theirs = scikit_learn(source, train, args.label)
    chosen = max(theirs, key=lambda fit: fit["val_acc1"])
    best = max(theirs, key=lambda fit: fit["acc1"])
    acc1 = ours.rows[0].value
    result = {
        "model": args.model,
        "n": ours.rows[0].n,
        "acc1": acc1,
        "ci95": ours.rows[0].ci95,
        "C": 1 / ours.details["l2"],
        "tried": ours.details["tried"],
        "knn_acc1": knn(source, train, label=args.label).rows[0].value,
        "scikit_learn": theirs,
        "points_above_scikit_learns_choice": 100 * (acc1 - chosen["acc1"]),
        "points_above_scikit_learns_best": 100 * (acc1 - best["acc1"]),
        "seconds": seconds | {"scikit_learn": sum(fit["seconds"] for fit in theirs)},
    }
    record("probe", result, args.out)


def scikit_learn(source: Source, train: Source, label: str) -> list[dict[str, float]]:
    """Of each C: the accuracy on the fifth kept back and, fitted to all, on the test data."""
    whole, test = named(train, label), named(source, label)
    fitted, chosen = split(whole)
    fits = []
    for c in GRID:
        began, model = time.perf_counter(), LogisticRegression(C=c, max_iter=1000)
        val_acc1 = model.fit(*arrays(fitted)).score(*arrays(chosen))
        acc1 = model.fit(*arrays(whole)).score(*arrays(test))
        seconds = time.perf_counter() - began
        fits.append({"C": c, "val_acc1": val_acc1, "acc1": acc1, "seconds": seconds})
        print("scikit-learn", fits[-1], flush=True)
    return fits


def arrays(pictures: Named) -> tuple[np.ndarray, list[str]]:
    return pictures.features.double().numpy(), pictures.truth


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
