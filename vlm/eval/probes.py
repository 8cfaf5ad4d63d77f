"""The probe and knn tasks: classifiers that are fitted to frozen features of training pictures."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.errors import ConfigError, DataError
from vlm.eval.labels import true_classes
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.heads.knn import NearestNeighbours
from vlm.heads.linear_probe import Labelled, choose_l2, fit
from vlm.metrics import ranking

VAL_SHARE = 0.2  # of the training pictures of a class
_QUERIES_AT_ONCE = 1024

Details = dict[str, Any]
Classifier = Callable[[Tensor], Tensor]  # features [N, D] to scores [N, C]


@dataclass(frozen=True)
class Named:
    """The pictures of a data set that have a class."""

    keys: list[str]
    truth: list[str]
    features: Float[Tensor, "N D"]
    clusters: list[Hashable]

    def __getitem__(self, rows: Sequence[int]) -> "Named":
        """Some of them."""
        return Named(
            [self.keys[row] for row in rows],
            [self.truth[row] for row in rows],
            self.features[torch.tensor(rows, dtype=torch.long)],
            [self.clusters[row] for row in rows],
        )

    def __add__(self, other: "Named") -> "Named":
        """Both."""
        return Named(
            self.keys + other.keys,
            self.truth + other.truth,
            torch.cat([self.features, other.features]),
            self.clusters + other.clusters,
        )

    def numbered(self, names: Sequence[str], device: torch.device) -> Labelled:
        """Features and the number of each class among the names; -1 if it is not there."""
        numbers = {name: number for number, name in enumerate(names)}
        labels = torch.tensor([numbers.get(name, -1) for name in self.truth])
        return Labelled(self.features.to(device), labels.to(device))


def probe(
    source: Source, train: Source, *, val: Source | None = None, label: str = "label"
) -> Outcome:
    """Acc1 and mean_per_class_recall of a linear classifier of the model's features.

    CLIP's protocol (2103.00020, appendix A.3): multinomial logistic regression with an L2 penalty,
    its lambda chosen on validation pictures, then fitted to these and the training pictures. As in
    CLIP_benchmark, and unlike in the paper, features are the embeddings: projected, of length 1.

    Args:
        source: What is measured. A class that the training data lacks cannot be named: a miss.
        train: What is fitted to.
        val: What lambda is chosen on; by default a fifth of `train`, see `split`.
        label: The metadata field that holds a sample's class.

    Raises:
        DataError: No sample has the label, or none is left to fit to or to choose by.
    """
    whole = named(train, label)
    fitted, chosen = split(whole) if val is None else (whole, named(val, label))
    both = fitted + chosen
    names, device = sorted(set(both.truth)), _device(source)
    parts = [_precise(part.numbered(names, device)) for part in (fitted, chosen, both)]
    best, tried = choose_l2(parts[0], parts[1], num_classes=len(names))
    classifier = fit(parts[2], num_classes=len(names), l2=best.l2)
    protocol = source.protocol(
        "probe",
        label=label,
        train=train.dataset.fingerprint,
        val=VAL_SHARE if val is None else val.dataset.fingerprint,
    )
    details: Details = {
        "l2": best.l2,
        "tried": [{"l2": l2, "val_acc1": accuracy} for l2, accuracy in tried],
        "num_train": len(fitted.keys),
        "num_val": len(chosen.keys),
    }
    rows = _measure(source, label, both.truth, classifier, details)
    return Outcome(rows, protocol, details)


def knn(
    source: Source,
    train: Source,
    *,
    label: str = "label",
    k: int = 20,
    temperature: float = 0.07,
) -> Outcome:
    """Acc1 and mean_per_class_recall of the weighted vote of the k nearest training pictures.

    Args:
        source: What is measured. A class that the training data lacks cannot be named: a miss.
        train: The neighbours.
        label: The metadata field that holds a sample's class.
        k: How many vote.
        temperature: A vote weighs exp(cosine / temperature).

    Raises:
        DataError: No sample has the label.
    """
    neighbours = named(train, label)
    names = sorted(set(neighbours.truth))
    data = neighbours.numbered(names, _device(source))
    classifier = NearestNeighbours(data.features, data.labels, len(names), k, temperature)
    settings = {"label": label, "k": k, "temperature": temperature}
    protocol = source.protocol("knn", train=train.dataset.fingerprint, **settings)
    details: Details = {"num_train": len(neighbours.keys)}
    rows = _measure(source, label, neighbours.truth, classifier, details)
    return Outcome(rows, protocol, details)


def named(source: Source, label: str) -> Named:
    """The pictures of a source that have the label.

    Raises:
        DataError: None has.
    """
    embedded = source.embedded
    truth = true_classes(embedded.items, label, None)
    if truth.is_multi_label:
        raise ConfigError(f"the field {label!r} holds lists; a probe needs one class a picture")
    pairs = zip(embedded.items, embedded.sample_ids.tolist(), strict=True)
    clusters = [cluster_of(*pair) for pair in pairs]
    keys = [item.key for item in embedded.items]
    names = [""] * len(keys)
    for row, (number,) in zip(truth.rows, truth.classes, strict=True):
        names[row] = truth.class_names[number]
    return Named(keys, names, embedded.features, clusters)[truth.rows]


def split(whole: Named) -> tuple[Named, Named]:
    """The pictures to fit to, and those to choose lambda by: a fifth of each class, one at least.

    By a hash of the keys. Drawn from all classes together, the classes that lost most to validation
    would be both the rarest to fit to and the most frequent to be judged by.

    Raises:
        DataError: No class has two pictures.
    """
    of_class: dict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(whole.keys)), key=lambda row: _digest(whole.keys[row])):
        of_class[whole.truth[row]].append(row)
    num_kept = {name: max(1, round(VAL_SHARE * len(rows))) for name, rows in of_class.items()}
    chosen = {
        row for name, rows in of_class.items() if len(rows) > 1 for row in rows[: num_kept[name]]
    }
    if not chosen:
        raise DataError(
            f"no class has two of the {len(whole.keys)} labelled training pictures: none can be "
            "kept back to choose lambda by; give more, or val_data"
        )
    rest = [row for row in range(len(whole.keys)) if row not in chosen]
    return whole[rest], whole[sorted(chosen)]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _device(source: Source) -> torch.device:
    """Where to fit: sums are fp64, which MPS has not."""
    device = source.model.device
    return torch.device("cpu") if device.type == "mps" else device


def _precise(data: Labelled) -> Labelled:
    """In fp64 on the CPU; few GPUs have units for it."""
    on_cpu = data.features.device.type == "cpu"
    return Labelled(data.features.double(), data.labels) if on_cpu else data


def _measure(
    source: Source, label: str, trained: Sequence[str], classifier: Classifier, details: Details
) -> list[Row]:
    """The rows of a classifier of the classes in `trained`; adds to the details."""
    test, names = named(source, label), sorted(set(trained))
    data = test.numbered(names, _device(source))
    predicted, hits = _classify(classifier, data)
    truths = zip(test.keys, test.truth, predicted.tolist(), strict=True)
    details["samples"] = [
        {"key": key, "truth": truth, "predicted": names[number]} for key, truth, number in truths
    ]
    details["unseen_classes"] = sorted(set(test.truth) - set(names))
    details["skipped"] = dict(source.embedded.skipped)
    details["num_without_label"] = len(source.embedded) - len(test.keys)
    return _rows(hits, test, Counter(trained))


def _classify(
    classifier: Classifier, data: Labelled
) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"]]:
    """The likeliest class of each picture, and whether it is right; a tie counts against it."""
    predicted, hits = [], []
    for start in range(0, len(data.labels), _QUERIES_AT_ONCE):
        chunk = slice(start, start + _QUERIES_AT_ONCE)
        scores, labels = classifier(data.features[chunk]), data.labels[chunk]
        predicted.append(scores.argmax(dim=1))
        hits.append(ranking.top_k_hits(scores, labels.clamp(min=0), 1) & (labels >= 0))
    return torch.cat(predicted).cpu(), torch.cat(hits).cpu()


def _rows(hits: Bool[Tensor, " N"], test: Named, trained: Counter[str]) -> list[Row]:
    """Chance is a constant guess, of (one of) the most frequent classes of the training data."""
    present, most = Counter(test.truth), max(trained.values())
    guess = max(present[name] for name, count in trained.items() if count == most)
    balance = np.array([1 / present[name] for name in test.truth])
    return [
        mean_row("acc1", hits.numpy(), test.clusters, chance=guess / len(test.truth)),
        mean_row(
            "mean_per_class_recall",
            hits.numpy(),
            test.clusters,
            chance=1 / len(present),
            weights=balance,
        ),
    ]
