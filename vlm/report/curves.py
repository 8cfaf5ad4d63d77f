"""What metrics.jsonl holds, as small multiples over the steps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vlm.report import chart
from vlm.report.html import Html, element, join
from vlm.report.inputs import Inputs, number
from vlm.report.numbers import is_rank, significant
from vlm.report.sections import Section


@dataclass(frozen=True)
class _Field:
    """A field of metrics.jsonl: what a reader calls it, and in what unit."""

    name: str
    title: str
    unit: str
    scale: float = 1.0
    from_zero: bool = True
    of_several_ranks: bool = False


_FIELDS = (
    _Field("lr", "Learning rate", "lr"),
    _Field("logit_scale", "Temperature", "logit scale, 1/τ", from_zero=False),
    _Field("grad_norm", "Gradient norm", "L2 norm before clipping"),
    _Field("samples_per_s", "Throughput", "samples/s"),
    _Field("data_wait", "Waiting for data", "% of time", 100.0),
    _Field(
        "communication",
        "Waiting for other ranks",
        "% of time, rank 0",
        100.0,
        of_several_ranks=True,
    ),
    _Field("padding_waste", "Padding", "% of text positions", 100.0),
    _Field("mfu", "FLOPs needed, of the peak", "% (MFU)", 100.0),
    _Field("recomputed", "Recomputation", "% of FLOPs", 100.0),
    _Field("peak_memory_gib", "Peak memory", "GiB, one rank"),
)


def curves(inputs: Inputs) -> Section:
    """What metrics.jsonl holds, as small multiples."""
    found = [_curve(inputs, field) for field in (*_loss_fields(inputs), *_FIELDS)]
    figures = [_figure(curve) for curve in (*found, *_measured(inputs)) if curve is not None]
    if not figures:
        command = element("code", f"vlm train {inputs.folder / 'config.yaml'} --resume auto")
        return Section("Curves", None, join("nothing logged yet; ", command))
    return Section("Curves", element("div", *figures, class_="curves"))


def _measured(inputs: Inputs) -> Iterator[chart.Curve]:
    """Yields each task's primary metric over the steps, the end's included."""
    ends = {f"eval/{r.task}-{r.split}/{r.metric}": r for r in inputs.primary}
    firsts: dict[str, str] = {}
    for name in (name for line in inputs.metrics for name in line if name.startswith("eval/")):
        firsts.setdefault(name.rpartition("/")[0], name)
    for name in firsts.values():
        points = [
            (step, value)
            for line in inputs.metrics
            if (step := number(line, "step")) and (value := number(line, name)) is not None
        ]
        end, last = ends.get(name), number(inputs.metrics[-1], "step")
        if end is not None and last is not None:
            points.append((last, end.value))
        scale = 1.0 if is_rank(name) else 100.0
        yield chart.Curve(
            title=f"{name.split('/')[1]}: {name.rpartition('/')[2]}",
            unit="place" if is_rank(name) else "%",
            points=chart.pool([step for step, _ in points], [scale * v for _, v in points]),
            reference=(scale * end.chance, "chance") if end is not None else None,
        )


def _loss_fields(inputs: Inputs) -> list[_Field]:
    names = (
        [name for name in inputs.metrics[-1] if name.startswith("loss")] if inputs.metrics else []
    )
    terms = [name for name in names if name != "loss"]
    shown = names if len(terms) > 1 else names[:1]  # a single term is the loss itself
    return [
        _Field(name, _loss_title(name), "nats", from_zero=False)
        for name in sorted(shown, key=lambda name: name != "loss")
    ]


def _loss_title(name: str) -> str:
    return "Loss" if name == "loss" else f"Loss: {name.removeprefix('loss/')}"


def _curve(inputs: Inputs, field: _Field) -> chart.Curve | None:
    lines = [line for line in inputs.metrics if number(line, "step") is not None]
    values = [number(line, field.name) for line in lines]
    if all(value is None for value in values) or (field.of_several_ranks and not any(values)):
        return None
    scaled = [math.nan if value is None else field.scale * value for value in values]
    reference = None
    size = inputs.setting("train.global_batch_size")
    if field.name == "loss/contrastive" and type(size) is int and size > 1:
        reference = (math.log(size), f"ln {size:,}: guessing")
    predicted = inputs.command.get("predicted_memory_gib")
    if field.name == "peak_memory_gib" and isinstance(predicted, float):
        reference = (predicted, f"predicted: {significant(predicted)}")
    return chart.Curve(
        title=field.title,
        unit=field.unit,
        points=chart.pool([float(line["step"]) for line in lines], scaled),
        from_zero=field.from_zero,
        reference=reference,
    )


def _figure(curve: chart.Curve) -> Html:
    last = next(point.mean for point in reversed(curve.points) if not math.isnan(point.mean))
    says = significant(last) + ("%" if curve.unit.startswith("%") else "")
    caption = element("figcaption", element("span", curve.title), element("b", says))
    return element("figure", caption, chart.draw(curve))
