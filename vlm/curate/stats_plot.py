"""One picture of what a data set consists of: sizes, formats, lengths of captions, scripts."""

from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vlm.curate.stats import Stats
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
    sizes, formats, lengths, scripts = figure.subplots(2, 2).flat
    _sizes(sizes, stats)
    _bars(formats, _formats(stats), "Pictures", samples)
    _lengths(lengths, stats)
    _bars(scripts, _scripts(stats), "Captions", stats.num_captions)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _formats(stats: Stats) -> dict[str, int]:
    return stats.formats | {"repeated": stats.num_repeated_images}


def _scripts(stats: Stats) -> dict[str, int]:
    named = {name.capitalize() if name != "CJK" else name: n for name, n in stats.scripts.items()}
    return named | {"repeated": stats.num_repeated_captions}


def _sizes(axes: Axes, stats: Stats) -> None:
    """The commonest sizes as bars, if they are few; else width against height, on log scales."""
    sizes = Counter(map(tuple, stats.image_sizes.tolist()))
    if len(sizes) <= MAX_BARS:
        named = {f"{width} x {height}": n for (width, height), n in sizes.most_common()}
        _bars(axes, named, "Picture sizes", len(stats.image_sizes))
        return
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
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _bars(axes: Axes, counts: dict[str, int], title: str, total: int) -> None:
    """Counts as bars from the left, each with its number and share; the least ones together."""
    _style(axes, title, grid="")
    ranked = list(counts.items())
    if len(ranked) > MAX_BARS:
        rest = sum(count for _, count in ranked[MAX_BARS - 2 : -1])
        ranked = [*ranked[: MAX_BARS - 2], ("others", rest), ranked[-1]]
    names, values = [name for name, _ in ranked], [count for _, count in ranked]
    places = range(len(ranked))
    colours = [FAINT if name in ("repeated", "others") else FILL for name in names]
    axes.barh(places, values, color=colours, height=0.62, zorder=2)
    for place, count in zip(places, values, strict=True):
        share = f"  {count:,}" + (f"  ({count / total:.1%})" if total else "")
        axes.text(count, place, share, va="center", color=INK, fontsize=9)
    axes.set_yticks(places, names, color=INK, fontsize=9)
    axes.set_ylim(max(len(ranked), 4) - 0.5, -0.5)
    axes.set_xlim(0, max([*values, 1]) * 1.32)
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
