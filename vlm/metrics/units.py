"""What the numbers of a metric are, so that they are shown as readers know them."""

from typing import Literal

Unit = Literal["share", "place", "points", "words"]

_UNITS: dict[str, Unit] = {"cider_d": "points", "clip_score": "points", "length": "words"}
_UNITS |= {"caption_perplexity": "points", "text_perplexity": "points"}


def unit_of(metric: str) -> Unit:
    """Shares are in 0..1 and shown in percent; places count from 1, and less is better.

    Points have a scale of their own (CIDEr-D 0..10, CLIPScore 0..2.5, perplexity from 1) and are
    shown as they are.
    """
    return _UNITS.get(metric, "place" if "rank" in metric else "share")
