"""The zero_shot task: name what each picture shows, out of the names of the data."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from vlm.eval.labels import Truth, check_are_names, true_classes
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.eval.statistics import NUM_RESAMPLES, resampled_interval
from vlm.heads import zero_shot as head
from vlm.heads.class_names import check_class_names, distinct
from vlm.metrics import classification, ranking
from vlm.metrics.classification import Floats

NUM_CONFUSIONS = 100
MAX_MATRIX = 200  # classes of a confusion matrix in the details
_TOP = 5
FIELDS_SCALE = 100.0  # of the logits that classes are ranked by, as everywhere in the field
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
            the sorted labels of the data, which then must not all be numbers.
        templates: As `vlm.heads.zero_shot.resolve_templates` takes them.

    Raises:
        ConfigError: A label is not among the class names, or these or the templates are wrong, or
            there are only numbers for names.
        DataError: No sample has the label, or no picture can be read.
    """
    forms = head.resolve_templates(templates)
    if class_names is not None:
        check_class_names(class_names, may_repeat=True)
    embedded = source.embedded
    truth = true_classes(embedded.items, label, class_names)
    if class_names is None:
        check_are_names(truth)
    names = truth.class_names
    items = [embedded.items[row] for row in truth.rows]
    ids = embedded.sample_ids[truth.rows].tolist()
    pictures = _Pictures(
        truth,
        [item.key for item in items],
        [cluster_of(item, sample_id) for item, sample_id in zip(items, ids, strict=True)],
        embedded.features[truth.rows],
        source.classifier(names, forms).weights,
        source.model.logit_scale,
    )
    rows, shown = _multi_label(pictures) if truth.is_multi_label else _single_label(pictures)
    details = {
        "class_names": names,
        "templates": list(forms),
        **shown,
        "skipped": dict(embedded.skipped),
        "num_without_label": len(embedded) - len(truth.rows),
    }
    protocol = source.protocol("zero_shot", label=truth.field, class_names=names, templates=forms)
    return Outcome(rows, protocol, details)


@dataclass(frozen=True)
class _Pictures:
    """The pictures that have a label, and what is asked of them."""

    truth: Truth
    keys: list[str]
    clusters: list[Hashable]
    features: Float[Tensor, "N D"]
    weights: Float[Tensor, "C D"]
    logit_scale: float


class _Likeliest(NamedTuple):
    """Each picture's likeliest classes, best first, up to five; shares at the model's own scale."""

    classes: Int[Tensor, "N K"]
    shares: Float[Tensor, "N K"]


def _logits(features: Float[Tensor, "N D"], weights: Float[Tensor, "C D"]) -> Float[Tensor, "N C"]:
    return head.zero_shot_logits(features, weights, logit_scale=FIELDS_SCALE)


def _likeliest(logits: Float[Tensor, "N C"], logit_scale: float) -> _Likeliest:
    found = logits.topk(min(_TOP, logits.shape[1]))
    scale = logit_scale / FIELDS_SCALE
    normaliser = (scale * logits).logsumexp(dim=1, keepdim=True)
    return _Likeliest(found.indices, (scale * found.values - normaliser).exp())


def _single_label(pictures: _Pictures) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what the details show."""
    num_classes, clusters = len(pictures.weights), pictures.clusters
    labels = torch.tensor([row[0] for row in pictures.truth.classes])
    chunks = []
    size = max(1, _SCORES_AT_ONCE // num_classes)
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        logits = _logits(pictures.features[rows], pictures.weights)
        hits = [ranking.top_k_hits(logits, labels[rows], k) for k in (1, 5)]
        recalled = logits.argmax(dim=1) == labels[rows]
        chunks.append((*hits, recalled, *_likeliest(logits, pictures.logit_scale)))
    acc1, acc5, recalled, *likely = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    measured = [mean_row("acc1", acc1.numpy(), clusters, chance=1 / num_classes)]
    if num_classes >= 5:
        measured.append(mean_row("acc5", acc5.numpy(), clusters, chance=5 / num_classes))
    balance = ranking.class_balanced_weights(labels).numpy()
    recall = mean_row(
        "mean_per_class_recall",
        recalled.numpy(),
        clusters,
        chance=1 / num_classes,
        weights=balance,
    )
    likeliest = _Likeliest(*likely)
    confidences = likeliest.shares[:, 0].double().numpy()
    measured += [recall, _calibration(confidences, acc1.numpy(), clusters)]
    mistakes = _mistakes(labels, likeliest.classes[:, 0], pictures.truth.class_names)
    return measured, {"samples": _samples(pictures, likeliest), **mistakes}


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


def _multi_label(pictures: _Pictures) -> tuple[list[Row], dict[str, Any]]:
    """The row, and what the details show: samples, and each class's average precision."""
    logits = _logits(pictures.features, pictures.weights)
    targets = torch.zeros_like(logits, dtype=torch.bool)
    for number, classes in enumerate(pictures.truth.classes):
        targets[number, classes] = True
    each = classification.average_precision(logits, targets)[0]

    def means(counts: Floats) -> Floats:
        found = classification.average_precision(logits, targets, counts)
        drawn = np.maximum((~np.isnan(found)).sum(axis=1), 1)
        mean: Floats = np.nansum(found, axis=1) / drawn
        return mean

    interval = resampled_interval(
        means,
        pictures.clusters,
        num_resamples=max(200, min(NUM_RESAMPLES, _RESAMPLED_SCORES // logits.numel())),
    )
    chance = classification.chance_average_precision(targets.sum(dim=0), len(targets)).mean()
    row = Row("mean_average_precision", float(each.mean()), interval, len(targets), float(chance))
    names = distinct(pictures.truth.class_names)
    return [row], {
        "samples": _samples(pictures, _likeliest(logits, pictures.logit_scale)),
        "confusions": [],
        "average_precision": dict(zip(names, each.tolist(), strict=True)),
    }


def _samples(pictures: _Pictures, likeliest: _Likeliest) -> list[dict[str, Any]]:
    """Each picture's true classes and its likeliest ones."""
    truth, names = pictures.truth, distinct(pictures.truth.class_names)
    samples = []
    likely = zip(likeliest.classes.tolist(), likeliest.shares.tolist(), strict=True)
    for key, true, (top, shares) in zip(pictures.keys, truth.classes, likely, strict=True):
        labels = [names[number] for number in true]
        sample = {
            "key": key,
            "truth": ", ".join(labels),
            "top": [(names[n], round(share, 4)) for n, share in zip(top, shares, strict=True)],
        }
        samples.append(sample | {"labels": labels} if truth.is_multi_label else sample)
    return samples
