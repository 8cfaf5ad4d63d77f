"""Small drawings as inline SVG: a curve over training steps, and a score with its interval.

Colours come from the page's style sheet, so that a drawing follows light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from vlm.report.html import Html, element, join
from vlm.report.numbers import metric, percent, significant, tick_label, ticks

WIDTH, HEIGHT = 320, 176
LEFT, RIGHT, TOP, BOTTOM = 46, 308, 22, 146  # of the plot within the drawing
MAX_POINTS = 160  # more are averaged, with the range behind the line
_BAR = 150

Number = int | float


class Point(NamedTuple):
    """The mean, least and largest value of neighbouring lines; NaN where none is finite."""

    step: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One quantity over steps.

    Attributes:
        title: What it is.
        unit: Of the y axis.
        points: From `pool`.
        from_zero: Whether the y axis begins at 0.
        reference: A value to compare with, drawn as a dashed line, and what it says; or None.
    """

    title: str
    unit: str
    points: Sequence[Point]
    from_zero: bool = False
    reference: tuple[float, str] | None = None


def pool(steps: Sequence[float], values: Sequence[float]) -> list[Point]:
    """About `MAX_POINTS` points of neighbouring values; the first and the last stand alone.

    Args:
        steps: At least one.
        values: One a step; NaN is no value.
    """
    size = max(1, math.ceil((len(steps) - 2) / MAX_POINTS))
    inner = range(1, len(steps) - 1, size)
    cuts = sorted({0, 1, *inner, len(steps) - 1, len(steps)})
    return [_pooled(steps[start:end], values[start:end]) for start, end in pairwise(cuts)]


def _pooled(steps: Sequence[float], values: Sequence[float]) -> Point:
    finite = [value for value in values if math.isfinite(value)]
    step = sum(steps) / len(steps)
    if not finite:
        return Point(step, math.nan, math.nan, math.nan)
    return Point(step, sum(finite) / len(finite), min(finite), max(finite))


def draw(curve: Curve) -> Html:
    """A curve as SVG, described in words for who cannot see it."""
    finite = [point for point in curve.points if not math.isnan(point.mean)]
    x = _scale([point.step for point in curve.points], from_zero=True)
    heights = [*(point.low for point in finite), *(point.high for point in finite)]
    heights += [curve.reference[0]] if curve.reference else []
    y = _scale(heights, from_zero=curve.from_zero)
    first, last = finite[0], finite[-1]
    label = (
        f"{curve.title} in {curve.unit}: {significant(first.mean)} at step {first.step:,.0f}, "
        f"{significant(last.mean)} at step {last.step:,.0f}"
    )
    return element(
        "svg",
        *_axes(curve, x, y),
        *_reference(curve, y),
        *_line(curve.points, x, y),
        _circle(x.at(last.step, LEFT, RIGHT), y.at(last.mean, BOTTOM, TOP)),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
    )


class _Scale(NamedTuple):
    low: float
    high: float

    def at(self, value: float, start: Number, end: Number) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(start + (end - start) * share, 1)


def _scale(values: Sequence[float], *, from_zero: bool) -> _Scale:
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    if high <= low:
        return _Scale(low, low + (abs(low) or 1.0)) if from_zero else _Scale(low - 1, low + 1)
    room = 0.0 if from_zero else 0.04 * (high - low)
    return _Scale(low - room, high + 0.04 * (high - low))


def _axes(curve: Curve, x: _Scale, y: _Scale) -> list[Html]:
    marks = [_text(curve.unit, 2, 10, "start")]
    for value in ticks(y.low, y.high, 4):
        at = y.at(value, BOTTOM, TOP)
        marks += [_segment(LEFT, at, RIGHT, at, "grid")]
        marks += [_text(tick_label(value), LEFT - 6, at + 3.5, "end")]
    steps = [value for value in ticks(x.low, x.high, 4) if value == round(value)]
    for value in steps:
        at = x.at(value, LEFT, RIGHT)
        marks += [_segment(at, BOTTOM, at, BOTTOM + 4, "axis")]
        marks += [_text(tick_label(value), at, BOTTOM + 16, "middle")]
    marks += [_segment(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")]
    return [*marks, _text("step", RIGHT, HEIGHT - 2, "end")]


def _reference(curve: Curve, y: _Scale) -> list[Html]:
    if curve.reference is None:
        return []
    value, says = curve.reference
    at = y.at(value, BOTTOM, TOP)
    return [_segment(LEFT, at, RIGHT, at, "reference"), _text(says, RIGHT, at - 5, "end")]


def _line(points: Sequence[Point], x: _Scale, y: _Scale) -> list[Html]:
    """The line of means and the range behind it, broken where no value is finite."""
    drawn: list[Html] = []
    for run in _runs(points):
        across = [x.at(point.step, LEFT, RIGHT) for point in run]
        mean, low, high = (
            [f"{at},{y.at(value, BOTTOM, TOP)}" for at, value in zip(across, values, strict=True)]
            for values in ([p.mean for p in run], [p.low for p in run], [p.high for p in run])
        )
        if low != high:
            drawn.append(element("polygon", class_="range", points=" ".join(high + low[::-1])))
        drawn.append(element("polyline", class_="line", points=" ".join(mean)))
    return drawn


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isnan(point.mean):
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def bar(name: str, value: float, interval: tuple[float, float], chance: float) -> Html:
    """A share as a bar from 0 to 1, a line for its interval, an upright tick for chance."""
    at, low, high, tick = (
        round(min(max(share, 0.0), 1.0) * _BAR, 1) for share in (value, *interval, chance)
    )
    label = (
        f"{metric(name, value)}, between {percent(interval[0])} and {percent(interval[1])}; "
        f"chance {percent(chance)}"
    )
    return element(
        "svg",
        element("rect", class_="track", x=0, y=5, width=_BAR, height=6, rx=1),
        element("rect", class_="fill", x=0, y=5, width=at, height=6, rx=1),
        _segment(low, 8, high, 8, "interval"),
        _segment(low, 5, low, 11, "interval"),
        _segment(high, 5, high, 11, "interval"),
        _segment(tick, 1, tick, 15, "chance"),
        class_="bar",
        viewBox=f"-1 0 {_BAR + 2} 16",
        width=_BAR + 2,
        height=16,
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def _segment(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Html:
    return element("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def _circle(cx: float, cy: float) -> Html:
    return element("circle", class_="end", cx=cx, cy=cy, r=2.5)


def _text(says: str, x: Number, y: Number, anchor: str) -> Html:
    return element("text", join(says), x=round(x, 1), y=round(y, 1), text_anchor=anchor)
