"""Markup that is escaped by construction: text is text until `element` makes it markup."""

import html
import re

_VOID = frozenset({"img", "meta"})
# Controls but tab and line feed; lone surrogates; marks that turn the text after them around, even
# beyond their element (UAX 9, 2.1 to 2.7).
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


class Html(str):
    """Text that is markup already; every other text is escaped."""

    __slots__ = ()


Child = str | None
Attribute = str | int | float | bool | None


def element(tag: str, *children: Child, **attributes: Attribute) -> Html:
    """An element around its children, which are escaped unless they are `Html`.

    Args:
        tag: The element's name.
        children: Markup or text; None is left out.
        attributes: A trailing `_` is dropped, any other becomes `-`; True stands bare, False and
            None are left out.
    """
    named = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Html(f"<{tag}{named}>")
    return Html(f"<{tag}{named}>{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """Markup and text one after the other."""
    return Html(
        "".join(
            child if isinstance(child, Html) else html.escape(clean(child))
            for child in children
            if child is not None
        )
    )


def clean(text: str) -> str:
    """`text` without control characters, lone surrogates and marks that turn the line around.

    Tabs and line breaks stay. Joiners stay too: emoji and several scripts are written with them.
    """
    return _HARMFUL.sub("", text)


def shorten(text: str, max_length: int = 240) -> str:
    """`text` on one line, cut to `max_length` characters with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else f"{line[: max_length - 1].rstrip()}…"


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(clean(str(value)))}"'
