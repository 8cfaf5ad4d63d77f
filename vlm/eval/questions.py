"""The questions task: answer what is asked about each picture, and compare with the answer."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from vlm.data.dataset import Dataset
from vlm.errors import DataError
from vlm.eval.source import Outcome, Row, Source, cluster_of, mean_row
from vlm.metrics.words import exact_match, words
from vlm.retrieval.embed import Pictures, read_pictures


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

    Args:
        source: The data: pictures whose meta has "qa", a list of {"question", "answer", "type"}.
            Pictures without a question are left out, and counted in the details.
        train_data: What the answers that chance means are learnt from: those of a model that sees
            the question alone (`Blind`). Without it chance is the best constant answer to each
            type, by this data's own answers.

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
    constant = _constant(answered.asked)
    blind = _blind(answered.asked, train_data)
    rows = [_row("accuracy", right, blind or constant, answered, None)]
    kinds = sorted({asked.type for asked in answered.asked})
    rows += [_row(f"accuracy/{kind}", right, blind or constant, answered, kind) for kind in kinds]
    protocol = source.protocol(
        "questions",
        decoding="greedy",
        chance=None if train_data is None else train_data.fingerprint,
    )
    return Outcome(rows, protocol, _details(answered, right, constant, blind))


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


def _answer(source: Source) -> _Answered:
    answered = _Answered()
    reading = read_pictures(
        source.model,
        source.dataset,
        batch_size=source.batch_size,
        description="answering",
        log=source.log,
    )
    for batch in reading:
        answered.skipped.update(batch.skipped)
        _answer_batch(source, batch, answered)
    return answered


def _answer_batch(source: Source, batch: Pictures, answered: _Answered) -> None:
    """Every question about a batch's pictures, `batch_size` of them at a time."""
    rows: list[int] = []
    start = len(answered.asked)
    for row, (item, sample_id) in enumerate(zip(batch.items, batch.sample_ids, strict=True)):
        asked = asked_of(item.meta, item.key)
        answered.num_without += not asked
        answered.asked += asked
        answered.keys += [item.key] * len(asked)
        answered.clusters += [cluster_of(item, int(sample_id))] * len(asked)
        rows += [row] * len(asked)
    texts = [asked.question for asked in answered.asked[start:]]
    answer = cast(Any, source.model).answer_pixels
    for at in range(0, len(rows), source.batch_size):
        part = slice(at, at + source.batch_size)
        answered.said += answer(batch.images[rows[part]], texts[part])


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


def _row(
    name: str,
    right: Sequence[bool],
    chance: Sequence[bool],
    answered: _Answered,
    kind: str | None,
) -> Row:
    chosen = [n for n, asked in enumerate(answered.asked) if kind in (None, asked.type)]
    clusters = [answered.clusters[n] for n in chosen]
    expected = float(np.mean([chance[n] for n in chosen]))
    return mean_row(name, [right[n] for n in chosen], clusters, chance=expected)


def _details(
    answered: _Answered, right: Sequence[bool], constant: list[bool], blind: list[bool] | None
) -> dict[str, Any]:
    shown = zip(answered.keys, answered.asked, answered.said, right, strict=True)
    return {
        "samples": [
            {"key": key, **asked._asdict(), "generated": said, "right": bool(ok)}
            for key, asked, said, ok in shown
        ],
        "best_constant": float(np.mean(constant)),
        "question_only": None if blind is None else float(np.mean(blind)),
        "skipped": dict(answered.skipped),
        "num_without_question": answered.num_without,
    }


def _normal(text: str) -> str:
    return " ".join(words(text))
