"""Numbers as a reader wants them: percentages, counts, durations, round ticks."""

import math
from collections.abc import Sequence

from vlm.metrics.units import unit_of


def percent(share: float) -> str:
    """A share in 0..1 with one decimal, small ones with two digits that count, or as none."""
    if 1e-6 <= abs(share) < 0.001:
        return f"{100 * share:.2g}%"
    return f"{100 * share:.1f}%"


def metric(name: str, value: float) -> str:
    """The value of a metric: a share as a percentage, a rank and the rest as they are."""
    kind = unit_of(name)
    if kind == "share":
        return percent(value)
    return f"{value:.3f}" if kind == "points" else f"{value:,.1f}"


def is_rank(name: str) -> bool:
    """Whether a metric counts places from 1, so that less is better."""
    return unit_of(name) == "place"


def metric_name(name: str) -> str:
    """As the field writes it."""
    return _NAMES.get(name, name.replace("_", " "))


_NAMES = {
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    **{f"distinct_{n}": f"distinct-{n}" for n in range(1, 3)},
    "cider_d": "CIDEr-D",
    "clip_score": "CLIPScore",
    "length": "length in words",
    "rouge_l": "ROUGE-L",
}


def significant(value: float) -> str:
    """Three digits that count; all of them from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def tick_label(value: float) -> str:
    """A round number, short: 0.0005, 40, 1.5k, 2M."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"


def duration(seconds: float) -> str:
    """The two largest units: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for (unit, size), (smaller, part) in (
        (("d", 86_400), ("h", 3_600)),
        (("h", 3_600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers in [low, high], about `count` of them; `low` is below `high`."""
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def listed(parts: Sequence[str]) -> str:
    """As "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
