"""The table of samples that could not be used: why, how many, and where the first of them lie."""

from vlm.report.html import Html, element, join, shorten
from vlm.report.inputs import BadSamples, Inputs
from vlm.report.sections import Section


def bad_samples(inputs: Inputs) -> Section:
    """What bad_samples.jsonl holds; a run without any has no such table."""
    if not inputs.bad_samples:
        return Section("Bad samples", None, join("none were met"))
    head = element(
        "tr",
        element("th", "reason", scope="col"),
        element("th", "count", scope="col", class_="number"),
        element("th", "first found", scope="col"),
    )
    rows = sorted(inputs.bad_samples, key=lambda row: -row.count)
    table = element(
        "table",
        element("caption", "Samples that could not be used", class_="visually-hidden"),
        element("thead", head),
        element("tbody", *map(_row, rows)),
    )
    scroller = element(
        "div", table, class_="scroller", tabindex=0, role="region", aria_label="Bad samples"
    )
    remark = element("p", "Each visit to a bad sample counts; it left the loss.", class_="remark")
    return Section("Bad samples", join(remark, scroller))


def _row(row: BadSamples) -> Html:
    places = [
        element("div", f"{e.shard}: ", element("code", shorten(e.key)), f" at byte {e.offset:,}")
        for e in row.examples
    ]
    return element(
        "tr",
        element("th", row.reason, scope="row"),
        element("td", f"{row.count:,}", class_="number"),
        element("td", *places),
    )
