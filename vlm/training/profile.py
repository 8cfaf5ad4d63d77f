"""Where the time of a training step goes: `vlm train CONFIG --profile`."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vlm.config.schema import Config
from vlm.runtime import distributed
from vlm.runtime.distributed import Ranks
from vlm.runtime.files import write_atomic
from vlm.training.marks import BACKWARD, FORWARD
from vlm.training.setup import Parts, build_parts
from vlm.training.timing import NUM_MEASURED, Profile, Row, measure

_BAR = 12  # characters of a whole step
_EIGHTHS = " ▏▎▍▌▋▊▉"


def profile_run(config: Config, ranks: Ranks, console: Console | None = None) -> None:
    """Take a run's first steps, print where their time goes, and write RUN/profile/.

    The weights are fresh, and thrown away; of a run that is there nothing is read or changed.

    Raises:
        ConfigError, DataError, DiskError: As training would.
    """
    folder = Path(config.run.dir) / "profile"
    try:
        parts = build_parts(config, ranks)
        found = measure(parts, ranks, trace=folder / "trace.json" if ranks.is_main else None)
        if ranks.is_main:
            numbers = json.dumps(_as_json(found, parts, ranks), indent=1)
            write_atomic(folder / "profile.json", numbers.encode())
            _print(found, parts, ranks, console or Console(highlight=False))
    finally:
        distributed.stop()


def _as_json(found: Profile, parts: Parts, ranks: Ranks) -> dict[str, Any]:
    return {
        "device": str(parts.step.device),
        "precision": parts.step.precision,
        "threads": torch.get_num_threads(),
        "world_size": ranks.world_size,
        "global_batch_size": parts.config.train.global_batch_size,
        **asdict(found),
        "seconds": found.seconds,
        "needed_flops": found.flops.needed,
        "mfu": found.mfu,
    }


def _print(found: Profile, parts: Parts, ranks: Ranks, console: Console) -> None:
    console.print(_step_table(found))
    for line in _notes(found, parts, ranks):
        console.print(line, soft_wrap=True)
    console.print(_operator_table(found))
    folder = Path(parts.config.run.dir) / "profile"
    console.print(f"numbers: {folder / 'profile.json'}", soft_wrap=True)
    console.print(f"trace:   {folder / 'trace.json'} (open it at ui.perfetto.dev)", soft_wrap=True)


def _step_table(found: Profile) -> Table:
    flop, rate = _unit(found.flops.needed), _unit(found.peak.flops_per_s)
    table = _table("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", min_width=_BAR)
    table.add_column(f"{flop}FLOP", justify="right")
    table.add_column(f"{rate}FLOP/s", justify="right")
    table.add_column("of peak", justify="right")
    for name, row, style in _lines(found.rows):
        table.add_row(name, *_cells(row, found), style=style)
    table.add_section()
    total = Row("step", found.seconds, found.flops.needed)
    table.add_row("step", *_cells(total, found), style="bold")
    return table


def _lines(rows: list[Row]) -> Iterator[tuple[str, Row, str]]:
    """Yields label, row and style; the parts of a pass stand indented below its sum."""
    begun = ""
    for row in rows:
        group = next((g for g in (FORWARD, BACKWARD) if row.part.startswith(g)), "")
        if group and group != begun:
            members = [each for each in rows if each.part.startswith(group)]
            seconds = sum(each.seconds for each in members)
            flops = sum((each.flops or 0.0 for each in members), 0.0)
            yield group[:-2], Row(group, seconds, flops), ""
        begun = group
        yield (f"  {row.part.removeprefix(group)}", row, "dim") if group else (row.part, row, "")


def _cells(row: Row, found: Profile) -> Iterator[str]:
    share = row.seconds / found.seconds
    yield f"{row.seconds * 1e3:,.1f}"
    yield f"{share:.1%}"
    yield _bar(share)
    if not row.flops:
        return
    rate = row.flops / row.seconds
    yield f"{row.flops / _SCALE[_unit(found.flops.needed)]:,.2f}"
    yield f"{rate / _SCALE[_unit(found.peak.flops_per_s)]:,.1f}"
    yield f"{rate / found.peak.flops_per_s:.0%}"


_SCALE = {"M": 1e6, "G": 1e9, "T": 1e12}


def _unit(flops: float) -> str:
    """The prefix in which the number has few digits."""
    return next((unit for unit in "TG" if flops >= 5 * _SCALE[unit]), "M")


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _notes(found: Profile, parts: Parts, ranks: Ranks) -> Iterator[str]:
    config, step = parts.config, parts.step
    rows = config.train.global_batch_size // ranks.world_size
    captions = f", {found.captioned_rows:,} captioned" if found.captioned_rows else ""
    yield (
        f"batch     {rows:,} samples a rank, {ranks.world_size} rank(s); texts of "
        f"{found.text_length} tokens{captions}"
    )
    times = sorted(seconds * 1e3 for seconds in found.step_s)
    listed = ", ".join(f"{ms:,.1f}" for ms in times)
    yield f"step      the median of {NUM_MEASURED} measured ones: {listed} ms"
    plain = sorted(found.unmarked_s)[NUM_MEASURED // 2]
    yield f"unmarked  {plain * 1e3:,.1f} ms, {rows / plain:,.0f} samples/s: the step left to itself"
    peak, flop, rate = found.peak, _unit(found.flops.needed), _unit(found.peak.flops_per_s)
    yield (
        f"peak      {peak.flops_per_s / _SCALE[rate]:,.0f} {rate}FLOP/s of {step.precision} on "
        f"{step.device}: {peak.source}"
    )
    yield f"{flop}FLOP     products that the forward and the backward pass need, each counted once"
    if found.flops.recomputed:
        yield (
            f"memory    {found.flops.recomputed / _SCALE[flop]:,.2f} {flop}FLOP more are computed "
            "twice to save it: not needed, and not in the table"
        )
    yield from _warnings(found, config, ranks)


def _warnings(found: Profile, config: Config, ranks: Ranks) -> Iterator[str]:
    """What the reader should know before believing a number."""
    if config.data.cache_gib:
        yield "data      the first pass: pictures are decoded that data.cache_gib keeps for later"
    if ranks.world_size > 1:
        yield "ranks     rank 0's times"
    if max(found.step_s) > 1.5 * min(found.step_s):
        yield "warning: the steps' times differ much; does something else run on this machine?"
    if found.num_skipped:
        yield (
            f"warning: {found.num_skipped} of {NUM_MEASURED} measured steps changed no weight: "
            "the loss or a gradient was not finite, or fewer than 2 samples were usable"
        )


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True, max_width=42)
    return table


def _operator_table(found: Profile) -> Table:
    table = _table(f"the {len(found.operators)} slowest operators")
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right")
    table.add_column("", min_width=_BAR)
    for each in found.operators:
        ms = f"{each.seconds * 1e3:,.1f}"
        table.add_row(each.name, f"{each.calls:,}", ms, f"{each.share:.1%}", _bar(each.share))
    return table
