"""The zero_shot task: name what each picture shows, out of the names of the data."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from vlm.errors import ConfigError, DataError
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.heads import zero_shot as head
from vlm.metrics import ranking
from vlm.retrieval.embed import Item

NUM_CONFUSIONS = 100
_CHUNK = 4096  # pictures whose logits are held at a time


def zero_shot(
    source: Source,
    *,
    label: str = "label",
    class_names: Sequence[str] | None = None,
    templates: str | Sequence[str] = "simple",
) -> Outcome:
    """Acc1, acc5 (with five classes or more) and mean_per_class_recall of a zero-shot classifier.

    Args:
        source: The data; samples without a label are left out, and counted in the details.
        label: The metadata field that holds a sample's class: its name, or its number in
            `class_names`, from 0.
        class_names: The classes; by default the sorted labels of the data.
        templates: As `vlm.heads.zero_shot.resolve_templates` takes them.

    Raises:
        ConfigError: A label is not among the class names, or these or the templates are wrong.
        DataError: No sample has the label, or no picture can be read.
    """
    forms = head.resolve_templates(templates)
    if class_names is not None:
        head.check_class_names(class_names)
    embedded = source.embedded
    truths = true_names(embedded.items, label, class_names)
    rows = [row for row, truth in enumerate(truths) if truth is not None]
    truth = [str(truths[row]) for row in rows]
    names = list(class_names or sorted(set(truth)))
    weights = head.zero_shot_weights(source.model, names, forms)
    ids = embedded.sample_ids[rows].tolist()
    items = [embedded.items[row] for row in rows]
    clusters = [cluster_of(item, sample_id) for item, sample_id in zip(items, ids, strict=True)]
    details = {
        "class_names": names,
        "templates": list(forms),
        **_details(source, embedded.features[rows], weights, names, items, truth),
        "skipped": dict(embedded.skipped),
        "num_without_label": len(truths) - len(rows),
    }
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers[name] for name in truth])
    ranks = class_ranks(embedded.features[rows], weights, labels)
    protocol = source.protocol("zero_shot", label=label, class_names=names, templates=forms)
    return Outcome(_rows(ranks, labels, clusters, len(names)), protocol, details)


def class_ranks(
    features: Float[Tensor, "N D"], weights: Float[Tensor, "C D"], labels: Int[Tensor, " N"]
) -> Int[Tensor, " N"]:
    """The rank of each picture's true class, from 0; ties are pessimistic."""
    ranks = []
    for start in range(0, len(features), _CHUNK):
        rows = slice(start, start + _CHUNK)
        positives = one_hot(labels[rows], len(weights)).bool()
        logits = head.zero_shot_logits(features[rows], weights)
        ranks.append(ranking.positive_ranks(logits, positives))
    return torch.cat(ranks)


def true_names(
    items: Sequence[Item], label: str, class_names: Sequence[str] | None
) -> list[str | None]:
    """The name of each sample's class; None where it has no label.

    Raises:
        ConfigError: A label is not among `class_names`.
        DataError: No sample has the label.
    """
    values = [item.meta.get(label) for item in items]
    if all(value is None for value in values):
        fields = sorted({field for item in items for field in item.meta})
        raise DataError(
            f"no sample has the field {label!r}; its fields are: {', '.join(fields) or 'none'}; "
            "name the one with the class as label"
        )
    if class_names is None:
        return [None if value is None else str(value) for value in values]
    known = set(class_names)
    found = [None if value is None else _name(value, class_names, known) for value in values]
    if unknown := sorted({name for name in found if name is not None} - known):
        raise ConfigError(
            f"{len(unknown)} labels of the data are not among the {len(class_names)} class names: "
            f"{', '.join(map(repr, unknown[:5]))}; add them, or name another label field"
        )
    return found


def _name(value: Any, class_names: Sequence[str], known: set[str]) -> str:
    """A class by its name, else by its number: CLIP_benchmark's `cls` counts from 0."""
    name = str(value)
    is_number = type(value) is int and name not in known and 0 <= value < len(class_names)
    return class_names[value] if is_number else name


def _rows(
    ranks: Int[Tensor, " N"], labels: Int[Tensor, " N"], clusters: list[Any], num_classes: int
) -> list[Row]:
    acc1 = (ranks < 1).numpy()
    rows = [mean_row("acc1", acc1, clusters, chance=1 / num_classes)]
    if num_classes >= 5:
        rows.append(mean_row("acc5", (ranks < 5).numpy(), clusters, chance=5 / num_classes))
    balance = ranking.class_balanced_weights(labels).numpy()
    mean_recall = mean_row(
        "mean_per_class_recall", acc1, clusters, chance=1 / num_classes, weights=balance
    )
    return [*rows, mean_recall]


def _rounded(ranking: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(name, round(probability, 4)) for name, probability in ranking]


def _details(
    source: Source,
    features: Tensor,
    weights: Tensor,
    names: list[str],
    items: list[Item],
    truth: list[str],
) -> dict[str, Any]:
    """Each sample's five likeliest classes, and the most frequent mistakes."""
    scale = source.model.logit_scale
    predictions = []
    for start in range(0, len(features), _CHUNK):
        chunk = features[start : start + _CHUNK]
        predictions += head.predict(chunk, weights, names, logit_scale=scale, top=5)
    samples = [
        {"key": item.key, "truth": name, "top": _rounded(prediction.ranking)}
        for item, name, prediction in zip(items, truth, predictions, strict=True)
    ]
    pairs = zip(truth, [prediction.label for prediction in predictions], strict=True)
    mistakes = Counter(pair for pair in pairs if pair[0] != pair[1])
    confusions = [
        {"truth": pair[0], "predicted": pair[1], "count": count}
        for pair, count in mistakes.most_common(NUM_CONFUSIONS)
    ]
    return {"samples": samples, "confusions": confusions}
