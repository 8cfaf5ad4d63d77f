"""The zero_shot task: name what each picture shows, out of the names of the data."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from vlm.eval.labels import Truth, true_classes
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.eval.statistics import NUM_RESAMPLES, resampled_interval
from vlm.heads import zero_shot as head
from vlm.heads.class_names import check_class_names, distinct
from vlm.metrics import classification, ranking
from vlm.metrics.classification import Floats

NUM_CONFUSIONS = 100
MAX_MATRIX = 200  # classes of a confusion matrix in the details
_TOP = 5
_SCORES_AT_ONCE = 2**22  # of a chunk of logits: 16 MiB
_RESAMPLED_SCORES = 10**9  # of mean average precision: about 10 s


def zero_shot(
    source: Source,
    *,
    label: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: str | Sequence[str] = "simple",
) -> Outcome:
    """Acc1, acc5 (from five classes on), mean_per_class_recall and calibration_error.

    Of labels that are lists it is the mean_average_precision instead. All are as CLIP_benchmark's
    `metrics/zeroshot_classification.py` computes them; the calibration error (1706.04599) is that
    of the model's own temperature, and its level of chance a perfectly calibrated model's.

    Args:
        source: The data; samples without a label are left out, and counted in the details.
        label: The metadata field that holds a sample's class: its name, or its number in
            `class_names`, from 0; or a list of these. By default "label", else "cls".
        class_names: The classes, told apart by their numbers, so that a name may repeat; by default
            the sorted labels of the data.
        templates: As `vlm.heads.zero_shot.resolve_templates` takes them.

    Raises:
        ConfigError: A label is not among the class names, or these or the templates are wrong.
        DataError: No sample has the label, or no picture can be read.
    """
    forms = head.resolve_templates(templates)
    if class_names is not None:
        check_class_names(class_names, may_repeat=True)
    embedded = source.embedded
    truth = true_classes(embedded.items, label, class_names)
    names = truth.class_names
    scored = _score(
        embedded.features[truth.rows],
        source.classifier(names, forms).weights,
        None if truth.is_multi_label else torch.tensor([row[0] for row in truth.classes]),
        source.model.logit_scale,
    )
    ids = embedded.sample_ids.tolist()
    clusters = [cluster_of(embedded.items[row], ids[row]) for row in truth.rows]
    measured, shown = (_multi_label if truth.is_multi_label else _single_label)(
        scored, truth, clusters
    )
    details = {
        "class_names": names,
        "templates": list(forms),
        "samples": _samples(scored, truth, [embedded.items[row].key for row in truth.rows]),
        **shown,
        "skipped": dict(embedded.skipped),
        "num_without_label": len(embedded) - len(truth.rows),
    }
    protocol = source.protocol("zero_shot", label=truth.field, class_names=names, templates=forms)
    return Outcome(measured, protocol, details)


@dataclass(frozen=True)
class Scored:
    """What a classifier says of N pictures.

    Attributes:
        top: The likeliest classes, up to five, best first.
        probabilities: Theirs, over all classes, at the model's own temperature.
        hits: Whether the true class is the first, and whether it is among the first five; empty
            where there are several true ones.
        first: The first of the largest logits, which CLIP_benchmark's recall goes by.
        logits: Of all classes, where there are several true ones; else empty.
    """

    top: Int[Tensor, "N K"]
    probabilities: Float[Tensor, "N K"]
    hits: Bool[Tensor, "N 2"]
    first: Int[Tensor, " N"]
    logits: Float[Tensor, "N C"]


def _score(
    features: Float[Tensor, "N D"],
    weights: Float[Tensor, "C D"],
    labels: Int[Tensor, " N"] | None,
    logit_scale: float,
) -> Scored:
    """Scores pictures a chunk at a time; `labels` is None where a picture has several."""
    size = max(1, _SCORES_AT_ONCE // len(weights))
    chunks = []
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        logits = head.zero_shot_logits(features[rows], weights)
        top = logits.topk(min(_TOP, len(weights)))
        own = logits * (logit_scale / 100)
        chances = (top.values * (logit_scale / 100) - own.logsumexp(dim=1, keepdim=True)).exp()
        if labels is None:
            hits, kept = torch.empty(len(logits), 0, dtype=torch.bool), logits
        else:
            ks = (ranking.top_k_hits(logits, labels[rows], k) for k in (1, 5))
            hits, kept = torch.stack(list(ks), dim=1), logits[:, :0]
        chunks.append((top.indices, chances, hits, logits.argmax(dim=1), kept))
    return Scored(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _single_label(
    scored: Scored, truth: Truth, clusters: list[Hashable]
) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what the details show of mistakes."""
    num_classes = len(truth.class_names)
    labels = torch.tensor([row[0] for row in truth.classes])
    acc1, acc5 = scored.hits.T.numpy()
    rows = [mean_row("acc1", acc1, clusters, chance=1 / num_classes)]
    if num_classes >= 5:
        rows.append(mean_row("acc5", acc5, clusters, chance=5 / num_classes))
    balance = ranking.class_balanced_weights(labels).numpy()
    right = (scored.first == labels).numpy()
    rows.append(
        mean_row("mean_per_class_recall", right, clusters, chance=1 / num_classes, weights=balance)
    )
    confidences = scored.probabilities[:, 0].double().numpy()
    rows.append(_calibration(confidences, acc1, clusters))
    return rows, _mistakes(labels, scored.top[:, 0], truth.class_names)


def _calibration(
    confidences: Float64[np.ndarray, " N"],
    hits: Bool[np.ndarray, " N"],
    clusters: list[Hashable],
) -> Row:
    """The calibration error; its interval comes from resampled pictures, binned anew.

    Noise adds to an absolute value, and resampling adds noise: where that would leave the value
    itself below the interval, the interval begins at the value.
    """
    value = float(classification.calibration_error(confidences, hits)[0])
    low, high = resampled_interval(
        lambda counts: classification.calibration_error(confidences, hits, counts), clusters
    )
    chance = classification.chance_calibration_error(confidences)
    return Row("calibration_error", value, (min(low, value), high), len(hits), chance)


def _mistakes(
    labels: Int[Tensor, " N"], predicted: Int[Tensor, " N"], class_names: list[str]
) -> dict[str, Any]:
    """The most frequent mistakes, and the whole matrix where there are not too many classes."""
    names = distinct(class_names)
    pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
    mistakes = Counter(pair for pair in pairs if pair[0] != pair[1])
    shown: dict[str, Any] = {
        "confusions": [
            {"truth": names[true], "predicted": names[taken], "count": count}
            for (true, taken), count in mistakes.most_common(NUM_CONFUSIONS)
        ]
    }
    if len(names) <= MAX_MATRIX:
        matrix = classification.confusion_matrix(labels, predicted, len(names))
        shown["confusion_matrix"] = matrix.tolist()
    return shown


def _multi_label(
    scored: Scored, truth: Truth, clusters: list[Hashable]
) -> tuple[list[Row], dict[str, Any]]:
    """Mean average precision over all classes, and that of each class for the details."""
    logits = scored.logits
    targets = torch.zeros_like(logits, dtype=torch.bool)
    for row, numbers in enumerate(truth.classes):
        targets[row, numbers] = True
    each = classification.average_precision(logits, targets)[0]

    def means(counts: Floats) -> Floats:
        found = classification.average_precision(logits, targets, counts)
        return np.nansum(found, axis=1) / np.maximum((~np.isnan(found)).sum(axis=1), 1)

    interval = resampled_interval(
        means,
        clusters,
        num_resamples=max(200, min(NUM_RESAMPLES, _RESAMPLED_SCORES // logits.numel())),
    )
    chance = classification.chance_average_precision(targets.sum(dim=0), len(targets)).mean()
    row = Row("mean_average_precision", float(each.mean()), interval, len(targets), float(chance))
    names = distinct(truth.class_names)
    return [row], {
        "average_precision": dict(zip(names, each.tolist(), strict=True)),
        "confusions": [],
    }


def _samples(scored: Scored, truth: Truth, keys: list[str]) -> list[dict[str, Any]]:
    """Each picture's true classes and its likeliest ones."""
    names = distinct(truth.class_names)
    samples = []
    likely = zip(scored.top.tolist(), scored.probabilities.tolist(), strict=True)
    for key, numbers, (top, shares) in zip(keys, truth.classes, likely, strict=True):
        true = [names[number] for number in numbers]
        sample = {
            "key": key,
            "truth": ", ".join(true),
            "top": [(names[n], round(share, 4)) for n, share in zip(top, shares, strict=True)],
        }
        samples.append(sample | {"labels": true} if truth.is_multi_label else sample)
    return samples
