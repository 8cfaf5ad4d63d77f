"""Questions about a picture, and what the captioner learns of them: the answers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vlm.data.samples import BadSample, value_at

NOTHING = -1  # the target of a position from which nothing is learned


class Questions(NamedTuple):
    """What the captioner learns beside captions.

    Attributes:
        field: Of the json: a list of {"question": ..., "answer": ...}.
        fraction: Of the visits to samples that have some, those in which answers are learned.
    """

    field: str
    fraction: float


class Text(NamedTuple):
    """What the captioner reads, and what it should say after each token of it.

    Attributes:
        tokens: Start and end of text included.
        targets: The token that follows each; `NOTHING` where it is given.
    """

    tokens: Int[np.ndarray, " l"]
    targets: Int[np.ndarray, " l"]


def questions_of(meta: dict[str, Any], field: str) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs in a field of a sample's meta; none where it is absent.

    Raises:
        BadSample: `text.questions`: it is no list of objects with both as texts.
    """
    found = value_at(meta, field)
    if found is None:
        return ()
    try:
        pairs = [(pair["question"], pair["answer"]) for pair in found]
    except (TypeError, KeyError):
        pairs = [(None, None)]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        rule = 'is not a list of {"question": ..., "answer": ...}'
        raise BadSample("text.questions", f'"{field}" {rule}')
    return tuple(pairs)


def whole(tokens: Int[np.ndarray, " l"]) -> Text:
    """A text of which every token is learned but the first: a caption."""
    return Text(tokens, np.append(tokens[1:], NOTHING))


def conversation(
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[str], Int[np.ndarray, " l"]],
    context_length: int,
) -> Text | None:
    """Questions and answers one after another, as many as there is room for; answers are learned.

    A picture is encoded once for all that is asked about it (LLaVA-1.5, arXiv 2310.03744, appendix
    A). After each answer the end of the text is learned, also where another question follows.

    Args:
        pairs: (question, answer), at least one. What fills the context alone is taken, cut, only
            where nothing else fits.
        encode: A text to token ids between start and end of text, cut to the context length.
        context_length: In tokens.

    Returns:
        None where no question leaves room for a token of its answer.
    """
    found, too_long = None, None
    room = context_length
    for question, answer in pairs:
        if room < 2:
            break
        turn = _turn(question, answer, encode)
        if len(turn.tokens) >= context_length:
            too_long = too_long or turn
        elif found is None:
            found, room = turn, context_length - len(turn.tokens)
        elif len(turn.tokens) - 2 <= room:
            # the end of the text before makes room, and its last token is where this turn starts
            tokens = np.concatenate([found.tokens[:-1], turn.tokens[1:]])
            found = Text(tokens, np.concatenate([found.targets[:-1], turn.targets[1:]]))
            room = context_length - len(tokens)
    if found is None and too_long is not None and (too_long.targets != NOTHING).sum() > 1:
        return too_long
    return found


def _turn(question: str, answer: str, encode: Callable[[str], Int[np.ndarray, " l"]]) -> Text:
    turn = whole(encode(f"{question} {answer}"))
    given = min(len(encode(question)), len(turn.tokens)) - 2  # targets in the question
    turn.targets[:given] = NOTHING
    return turn
