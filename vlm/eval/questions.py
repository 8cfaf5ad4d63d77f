"""The questions task: answer what is asked about each picture, and compare with the answer."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vlm.data.dataset import Dataset
from vlm.errors import DataError
from vlm.eval.source import Described, Outcome, Row, Source, cluster_of, mean_row
from vlm.metrics.words import exact_match, words
from vlm.retrieval.embed import Pictures


class Asked(NamedTuple):
    """One entry of a picture's "qa"."""

    question: str
    answer: str
    type: str


@dataclass
class _Answered:
    """All questions, in the order of the data, with what the model said."""

    keys: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    clusters: list[Hashable] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    num_without: int = 0


class Blind:
    """Answers without the picture: what was most often right for the same question, else its type.

    Args:
        pairs: Questions and answers to learn from. Ties go to the answer seen first.
    """

    def __init__(self, pairs: Iterable[Asked]) -> None:
        self._by_question: dict[str, Counter[str]] = defaultdict(Counter)
        self._by_type: dict[str, Counter[str]] = defaultdict(Counter)
        for question, answer, kind in pairs:
            self._by_question[_normal(question)][_normal(answer)] += 1
            self._by_type[kind][_normal(answer)] += 1

    def __call__(self, question: str, kind: str) -> str:
        """The answer; empty for a type that was never seen."""
        counts = self._by_question.get(_normal(question)) or self._by_type.get(kind)
        return counts.most_common(1)[0][0] if counts else ""


def questions(source: Source, *, train_data: Dataset | None = None) -> Outcome:
    """The share of answers whose words equal the right one's: over all questions, then by type.

    Chance is the best constant answer to each type, by this data's own answers; or what a model
    reaches that reads the question alone (`Blind`, fitted on training data), where that is better.

    Args:
        source: The data: pictures whose meta has "qa", a list of {"question", "answer", "type"}.
            Pictures without a question are left out, and counted in the details.
        train_data: What `Blind` is fitted on; without it, chance is the constant answers alone.

    Raises:
        ConfigError: The model can't answer.
        DataError: No readable picture has a question, or one is not as it should be.
    """
    answered = _answer(source)
    if not answered.asked:
        raise DataError(
            'no readable picture has a question: the questions task needs some, in the field "qa"'
        )
    right = [
        exact_match(said, [asked.answer])
        for said, asked in zip(answered.said, answered.asked, strict=True)
    ]
    constant, blind = _constant(answered.asked), _blind(answered.asked, train_data)
    kinds = sorted({asked.type for asked in answered.asked})
    shares = {kind: _shares(answered.asked, kind, constant, blind) for kind in kinds}
    chance = {kind: max(share for share in shares[kind].values()) for kind in kinds}
    rows = [_row("accuracy", right, chance, answered, kinds)]
    rows += [_row(f"accuracy/{kind}", right, chance, answered, [kind]) for kind in kinds]
    protocol = source.protocol(
        "questions",
        decoding="greedy",
        chance=None if train_data is None else train_data.fingerprint,
    )
    return Outcome(rows, protocol, _details(answered, right, shares))


def asked_of(meta: dict[str, Any], key: str) -> list[Asked]:
    """A picture's questions.

    Raises:
        DataError: Its "qa" is not a list of questions, each with an answer and a type.
    """
    found = meta.get("qa", [])
    entries = found if isinstance(found, list) else [None]
    asked = []
    for entry in entries:
        values = [entry.get(x, "") for x in Asked._fields] if isinstance(entry, dict) else [""]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise DataError(
                f'{key}: "qa" must be a list of {{"question": TEXT, "answer": TEXT, "type": TEXT}}'
            )
        asked.append(Asked(*values))
    return asked


def answers(source: Source, batch: Pictures) -> list[list[str]]:
    """What the model answers to each picture's questions, `batch_size` of them at a time."""
    asked = [asked_of(item.meta, item.key) for item in batch.items]
    rows = [row for row, several in enumerate(asked) for _ in several]
    texts = [one.question for several in asked for one in several]
    said: list[str] = []
    for at in range(0, len(rows), source.batch_size):
        part = slice(at, at + source.batch_size)
        said += source.model.caption_pixels(batch.images[rows[part]], prompt=texts[part])
    left = iter(said)
    return [[next(left) for _ in several] for several in asked]


def answer(source: Source) -> Described:
    """The answers about each picture, by all ranks together."""
    return source.describe("questions", partial(answers, source), description="answering")


def _answer(source: Source) -> _Answered:
    found = answer(source)
    answered = _Answered(skipped=Counter(found.skipped))
    for item, sample_id, said in zip(found.items, found.sample_ids, found.values, strict=True):
        answered.num_without += not said
        answered.said += said
        answered.asked += asked_of(item.meta, item.key)
        answered.keys += [item.key] * len(said)
        answered.clusters += [cluster_of(item, sample_id)] * len(said)
    return answered


def _constant(asked: Sequence[Asked]) -> list[bool]:
    """Whether the best constant answer to its type is right for each question."""
    blind = Blind(Asked("", answer, kind) for _, answer, kind in asked)
    best = {kind: blind._by_type[kind].most_common(1)[0][0] for kind in {a.type for a in asked}}
    return [_normal(answer) == best[kind] for _, answer, kind in asked]


def _blind(asked: Sequence[Asked], train_data: Dataset | None) -> list[bool] | None:
    """Whether an answer from the question alone is right for each; None without training data."""
    if train_data is None:
        return None
    metas = enumerate(train_data.metas())
    blind = Blind(pair for number, meta in metas for pair in asked_of(meta, f"sample {number}"))
    return [blind(question, kind) == _normal(answer) for question, answer, kind in asked]


def _shares(
    asked: Sequence[Asked], kind: str, constant: list[bool], blind: list[bool] | None
) -> dict[str, float]:
    """Of the questions of a type, the shares answered rightly without looking."""
    chosen = [n for n, one in enumerate(asked) if one.type == kind]
    ways = {"best_constant": constant} | ({} if blind is None else {"question_only": blind})
    return {name: float(np.mean([right[n] for n in chosen])) for name, right in ways.items()}


def _row(
    name: str,
    right: Sequence[bool],
    chance: dict[str, float],
    answered: _Answered,
    kinds: Sequence[str],
) -> Row:
    chosen = [n for n, asked in enumerate(answered.asked) if asked.type in kinds]
    clusters = [answered.clusters[n] for n in chosen]
    expected = float(np.mean([chance[answered.asked[n].type] for n in chosen]))
    return mean_row(name, [right[n] for n in chosen], clusters, chance=expected)


def _details(
    answered: _Answered, right: Sequence[bool], shares: dict[str, dict[str, float]]
) -> dict[str, Any]:
    shown = zip(answered.keys, answered.asked, answered.said, right, strict=True)
    return {
        "samples": [
            {"key": key, **asked._asdict(), "generated": said, "right": bool(ok)}
            for key, asked, said, ok in shown
        ],
        "without_looking": shares,
        "skipped": dict(answered.skipped),
        "num_without_question": answered.num_without,
    }


def _normal(text: str) -> str:
    return " ".join(words(text))
