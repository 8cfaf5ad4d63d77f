"""`write_report`: a run folder as one self-contained page, without scripts and without network."""

from importlib.resources import files
from pathlib import Path

from vlm.errors import ConfigError, DiskError
from vlm.report import curves, galleries, sections
from vlm.report.bad_samples import bad_samples
from vlm.report.html import Html, element, join
from vlm.report.inputs import Inputs, read_run
from vlm.report.pictures import Pictures
from vlm.runtime.files import write_atomic

_GENERATOR = '<meta name="generator" content="vlm report">'
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write a run's report and return where it is.

    Args:
        run: The run folder.
        out: The file to write, by default `report.html` in the run folder. An older report there
            is replaced, any other file is not.

    Raises:
        ConfigError: `run` is no run folder, or `out` is a file that is no report.
        DataError: A file of the run is damaged.
        DiskError: The report cannot be written.
    """
    inputs = read_run(run)
    path = run / "report.html" if out is None else out
    _refuse_foreign(path)
    write_atomic(path, render(inputs).encode())
    return path


def render(inputs: Inputs) -> Html:
    """The whole page."""
    pictures = Pictures()
    parts = [
        sections.results(inputs),
        curves.curves(inputs),
        galleries.zero_shot(inputs, pictures),
        galleries.retrieval(inputs, pictures),
        galleries.captions(inputs, pictures),
        galleries.confusions(inputs, pictures),
        bad_samples(inputs),
        sections.configuration(inputs),
    ]
    links = [element("a", part.name, href=f"#{part.anchor}") for part in parts if part.body]
    main = element("main", *(part.render() for part in parts))
    nav = element("nav", *links, aria_label="Sections")
    body = element("body", sections.head(inputs), nav, main, sections.foot())
    html = element("html", _head(inputs), body, lang="en")
    return Html(f"<!doctype html>\n{html}\n")


def _head(inputs: Inputs) -> Html:
    style = (files("vlm.report") / "style.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        Html(_GENERATOR),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", join(inputs.name, " · vlm report")),
        element("style", Html(style)),
    )


def _refuse_foreign(path: Path) -> None:
    """A report may be written again; what else lies there stays."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"{path}: cannot write: {error.strerror}") from error
    if _GENERATOR.encode() not in start:
        raise ConfigError(f"{path}: exists and is no report; choose another --out, or remove it")
