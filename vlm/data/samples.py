"""What one sample is, and how its captions and meta are read from its text fields."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One picture and what is said about it.

    Attributes:
        key: Its name, unique in its shard.
        image: The encoded picture as it lies in the shard.
        captions: Of the `.json`'s "captions" or "caption", else the `.txt`; none is empty.
        meta: The rest of the `.json`, and the `.cls` as "cls".
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any]


class BadSample(Exception):
    """A sample that cannot be used: it keeps its slot, is masked, and is counted by `reason`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def value_at(meta: dict[str, Any], field: str) -> Any:
    """What a sample's meta holds under a name, or b in the object a for "a.b"; None without it."""
    if field in meta:
        return meta[field]
    found: Any = meta
    for name in field.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def negatives_of(meta: dict[str, Any], field: str, num_captions: int) -> tuple[str | None, ...]:
    """The false text beside each caption, in a field of a sample's meta; None where it is blank.

    Args:
        meta: Of the sample.
        field: Its name, as `value_at` takes it: a text, beside all captions, or a list with a text
            or null for each.
        num_captions: Of the sample.

    Raises:
        BadSample: `text.negatives`: it is neither, or of another length.
    """
    found = value_at(meta, field)
    if found is None or isinstance(found, str):
        found = [found] * num_captions
    if not isinstance(found, list) or not all(isinstance(t, str | None) for t in found):
        raise BadSample("text.negatives", f'"{field}" is neither a text nor a list of texts')
    if len(found) != num_captions:
        raise BadSample(
            "text.negatives", f'"{field}" has {len(found)} texts beside {num_captions} captions'
        )
    return tuple(text if text and text.strip() else None for text in found)


def parse_texts(
    *, json_text: bytes | None = None, txt: bytes | None = None, cls: bytes | None = None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Returns (captions, meta) of the text fields that a sample has.

    Captions are the JSON object's "captions" (a list), else its "caption", else the txt, without
    those that are empty or only white space. A class that is a whole number becomes one.

    Raises:
        BadSample: `text.json` or `text.encoding`.
    """
    meta = {} if json_text is None else _json_object(json_text)
    captions = _captions(meta.pop("captions", None), meta.pop("caption", None))
    if not captions and txt is not None:
        captions = _cleaned([_decoded(txt, "txt")])
    if cls is not None:
        label = _decoded(cls, "cls").strip()
        meta["cls"] = int(label) if re.fullmatch(r"0|-?[1-9]\d{0,17}", label, re.ASCII) else label
    return captions, meta


def _captions(many: object, one: object) -> tuple[str, ...]:
    if many is not None and not (
        isinstance(many, list) and all(isinstance(text, str) for text in many)
    ):
        raise BadSample("text.json", '"captions" is not a list of strings')
    if one is not None and not isinstance(one, str):
        raise BadSample("text.json", '"caption" is not a string')
    return _cleaned(many or []) or _cleaned([one or ""])


def _cleaned(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts if text.strip())


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("text.encoding", f"its {what} is not UTF-8: {error.reason}") from None


def _json_object(data: bytes) -> dict[str, Any]:
    text = _decoded(data, "json")
    try:
        found = _JSON.decode(text)
        if "\\u" in text:  # an escape may spell half a character, which no text can hold
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadSample("text.encoding", "its json escapes a lone surrogate") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("text.json", f"its json cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise BadSample("text.json", f"its json is a {type(found).__name__}, not an object")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is not a finite number")
    return value


_JSON = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)  # built once: half the time
