"""One picture of what a data set consists of: sizes, formats, lengths of captions, scripts."""

from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vlm.curate.stats import Stats, repeated
from vlm.runtime.files import write_atomic

FILL, INK, FAINT, GRID = "#2457c5", "#1d1d1b", "#5f5f5a", "#e2e2dc"
MAX_BARS = 8


def plot(stats: Stats, path: Path, *, title: str) -> None:
    """Writes the PNG.

    Raises:
        DiskError: It cannot be written.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)  # inches
    figure = Figure(figsize=(10, 6.6), dpi=150, layout=layout)
    samples = len(stats.caption_lengths)
    figure.suptitle(
        f"{title}: {samples:,} samples, {stats.num_captions:,} captions",
        x=0.02,
        ha="left",
        color=INK,
        fontsize=13,
        fontweight="bold",
        parse_math=False,
    )
    figure.supxlabel(f"repeated: {repeated(stats)}", x=0.02, ha="left", color=FAINT, fontsize=9)
    columns = figure.add_gridspec(1, 2, width_ratios=(1.2, 1))
    sizes = Counter(map(tuple, stats.image_sizes.tolist()))
    maps = [_lengths] if len(sizes) <= MAX_BARS else [_sizes, _lengths]
    places = columns[0].subgridspec(len(maps), 1)
    for row, draw in enumerate(maps):
        draw(figure.add_subplot(places[row]), stats)
    bars = _counted(stats, sizes)
    rows = [len(bar.counts) + 1.2 for bar in bars]
    rest = max(0.0, 14 - sum(rows))  # few bars stay slender
    cells = columns[1].subgridspec(len(rows) + 1, 1, height_ratios=[*rows, rest + 0.01])
    for row, bar in enumerate(bars):
        _bars(figure.add_subplot(cells[row]), bar)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


class _Bars(NamedTuple):
    """Counts by name, the largest first; and what is all."""

    title: str
    counts: dict[str, int]
    total: int


def _counted(stats: Stats, sizes: Counter[tuple[int, ...]]) -> list[_Bars]:
    """What is told in bars: sizes too, if they are few."""
    scripts = {
        "CJK" if name == "CJK" else name.capitalize(): n for name, n in stats.scripts.items()
    }
    samples = len(stats.image_sizes)
    bars = [
        _Bars("Formats of pictures", stats.formats, samples),
        _Bars("Captions with letters of", scripts, stats.num_captions),
    ]
    if len(sizes) <= MAX_BARS:
        named = {f"{width} x {height}": n for (width, height), n in sizes.most_common()}
        bars.insert(0, _Bars("Picture sizes", named, samples))
    return [bar._replace(counts=_fewer(bar.counts)) for bar in bars if bar.counts]


def _fewer(counts: dict[str, int]) -> dict[str, int]:
    """At most `MAX_BARS` of them, the least ones together."""
    ranked = list(counts.items())
    if len(ranked) <= MAX_BARS:
        return counts
    others = sum(count for _, count in ranked[MAX_BARS - 1 :])
    return dict([*ranked[: MAX_BARS - 1], ("others", others)])


def _sizes(axes: Axes, stats: Stats) -> None:
    """Width against height, on log scales."""
    _style(axes, "Picture sizes", grid="both")
    widths, heights = stats.image_sizes.T
    edges = np.geomspace(stats.image_sizes.min() * 0.95, stats.image_sizes.max() * 1.05, 49)
    counts, _, _ = np.histogram2d(widths, heights, bins=(edges, edges))
    shown = np.ma.masked_equal(counts.T, 0)
    mesh = axes.pcolormesh(edges, edges, shown, cmap="viridis_r", norm="log", zorder=2)
    axes.set(xscale="log", yscale="log", xlabel="width, pixels", ylabel="height, pixels")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=FAINT)
    bar.set_label("pictures", color=FAINT, fontsize=9)


def _lengths(axes: Axes, stats: Stats) -> None:
    _style(axes, "Length of each sample's longest caption", grid="y")
    lengths = stats.caption_lengths[stats.caption_lengths > 0]
    if not len(lengths):
        axes.text(0.5, 0.5, "no captions", transform=axes.transAxes, ha="center", color=FAINT)
        axes.set(xticks=[], yticks=[])
        return
    end = max(np.quantile(lengths, 0.995), lengths.min() + 1)  # a few giants would flatten the rest
    step = max(1, round((end - lengths.min()) / 40))
    edges = np.arange(lengths.min(), end + step, step) - 0.5
    axes.hist(np.clip(lengths, None, edges[-1]), bins=edges.tolist(), color=FILL, zorder=2)
    median = float(np.median(lengths))
    axes.axvline(median, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.annotate(
        f"median {median:,.0f}",
        (median, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -10),
        textcoords="offset points",
        color=INK,
        fontsize=9,
    )
    beyond = f"; the last bar holds all above {edges[-2]:,.0f}" if lengths.max() > edges[-1] else ""
    axes.set(xlabel=f"characters{beyond}", ylabel="samples")
    axes.margins(y=0.12)  # room for the median's number
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _bars(axes: Axes, bars: _Bars) -> None:
    """Bars from the left, each with its number and share."""
    _style(axes, bars.title, grid="")
    places, names = range(len(bars.counts)), list(bars.counts)
    colours = [FAINT if name == "others" else FILL for name in names]
    axes.barh(places, list(bars.counts.values()), color=colours, height=0.6, zorder=2)
    for place, count in enumerate(bars.counts.values()):
        share = f"  {count:,}" + (f"  ({count / bars.total:.1%})" if bars.total else "")
        axes.text(count, place, share, va="center", color=INK, fontsize=9)
    axes.set_yticks(places, names, color=INK, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max([*bars.counts.values(), 1]) * 1.4)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _style(axes: Axes, title: str, *, grid: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9, length=3)
    axes.xaxis.label.set(color=FAINT, fontsize=9)
    axes.yaxis.label.set(color=FAINT, fontsize=9)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8, zorder=0)  # type: ignore[arg-type]
