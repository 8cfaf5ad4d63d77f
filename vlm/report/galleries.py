"""What a model did, picture by picture: classes, searches, captions and confusions."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from vlm.report.html import Html, element, join, shorten
from vlm.report.inputs import (
    Captioned,
    Captions,
    Classified,
    Confusion,
    Details,
    Inputs,
    Query,
    Retrieval,
    ZeroShot,
)
from vlm.report.matrix import draw_matrix
from vlm.report.numbers import listed, metric, metric_name, percent
from vlm.report.pictures import Album, Pictures
from vlm.report.sections import Section, how_to_measure

NUM_CLASSIFIED = 12
NUM_QUERIES = 8  # a direction
NUM_HITS = 8
NUM_CAPTIONED = 12
NUM_CONFUSIONS = 12
NUM_REFERENCES = 3

T = TypeVar("T")
D = TypeVar("D", bound=Details)
_HIDDEN = "visually-hidden"


def zero_shot(inputs: Inputs, pictures: Pictures) -> Section:
    """Pictures with their five likeliest classes."""
    return _section("Zero-shot", inputs, pictures, ZeroShot, _classified)


def retrieval(inputs: Inputs, pictures: Pictures) -> Section:
    """Pictures found by text, and texts found by picture."""
    return _section("Retrieval", inputs, pictures, Retrieval, _searches)


def captions(inputs: Inputs, pictures: Pictures) -> Section:
    """Generated captions beside those that people wrote."""
    return _section("Captions", inputs, pictures, Captions, _captioned)


def confusions(inputs: Inputs, pictures: Pictures) -> Section:
    """The most frequent mistakes, with a picture of each class."""
    return _section("Confusions", inputs, pictures, ZeroShot, _confused)


def _section(
    name: str,
    inputs: Inputs,
    pictures: Pictures,
    kind: type[D],
    gallery: Callable[[D, Album], Html],
) -> Section:
    """The first split's gallery in the open, those of the others folded."""
    found = [details for details in inputs.details if isinstance(details, kind)]
    if not found:
        absent = how_to_measure(inputs, "not measured") if inputs.results else None
        return Section(name, None, absent or join("no results yet"))
    bodies = [_gallery(details, pictures, gallery) for details in found]
    if len(found) == 1:
        return Section(name, join(element("p", found[0].split, class_="split"), bodies[0]))
    folds = [
        element("details", element("summary", details.split), body, open=not number)
        for number, (details, body) in enumerate(zip(found, bodies, strict=True))
    ]
    return Section(name, join(*folds))


def _gallery(details: D, pictures: Pictures, gallery: Callable[[D, Album], Html]) -> Html:
    album = pictures.album(details.data)
    problem = None
    if album.problem:
        problem = element("p", f"Without pictures: {album.problem}", class_="absent")
    elif album.fingerprint != details.fingerprint:
        text = "The data has changed since it was measured; the pictures are of today's."
        problem = element("p", text, class_="absent")
    return join(problem, gallery(details, album))


def draw_lots(items: Iterable[T], name: Callable[[T], str], num: int) -> list[T]:
    """`num` of the items, drawn and ordered by a hash of their names: the same every time."""
    return sorted(items, key=lambda item: hashlib.sha256(name(item).encode()).digest())[:num]


def mix(
    items: Sequence[T], name: Callable[[T], str], is_right: Callable[[T], bool], num: int
) -> list[T]:
    """As many right items as wrong ones, as far as there are; the others fill up."""
    right = draw_lots(filter(is_right, items), name, num)
    wrong = draw_lots((item for item in items if not is_right(item)), name, num)
    num_right = max(num // 2, num - len(wrong))
    return draw_lots([*right[:num_right], *wrong[: num - len(right[:num_right])]], name, num)


def _classified(details: ZeroShot, album: Album) -> Html:
    samples = details.samples
    chosen = mix(samples, lambda s: s.key, lambda s: s.is_true(s.predicted), NUM_CLASSIFIED)
    num_right = sum(sample.is_true(sample.predicted) for sample in chosen)
    return join(
        _remark(
            f"{num_right} pictures named right and {len(chosen) - num_right} named wrong, drawn by "
            "lot: the mix is not the accuracy. Beside each, its five likeliest classes."
        ),
        element("ul", *(_card(sample, album) for sample in chosen), class_="cards"),
    )


def _card(sample: Classified, album: Album) -> Html:
    rows = [
        element("li", *_likely(name, share, sample.is_true(name)), class_="likely")
        for name, share in sample.top[:5]
    ]
    title = element(
        "h3", _mark(sample.is_true(sample.predicted)), shorten(sample.truth, 80), dir="auto"
    )
    body = element("div", title, element("ol", *rows), class_="body")
    return element("li", album.show(sample.key), body, class_="card")


def _likely(name: str, share: float, is_true: bool) -> list[Html]:
    """A class over a bar of its probability."""
    truth = element("span", " (the truth)", class_=_HIDDEN) if is_true else None
    style = f"--share:{min(max(share, 0), 1):.4f}"
    class_ = "true" if is_true else None
    label = element("span", shorten(name, 60), truth, class_=class_, style=style, dir="auto")
    return [label, element("b", percent(share))]


def _mark(is_right: bool) -> Html:
    says = "right: " if is_right else "wrong: "
    return join(
        element(
            "span",
            "✓" if is_right else "✗",
            class_="mark right" if is_right else "mark wrong",
            aria_hidden="true",
        ),
        element("span", says, class_=_HIDDEN),
    )


def _searches(details: Retrieval, album: Album) -> Html:
    asked = mix(details.text_to_image, _name, _is_found, NUM_QUERIES)
    seen = mix(details.image_to_text, _name, _is_found, NUM_QUERIES)
    return join(
        element("h3", "Text to pictures", class_="direction"),
        _remark(
            f"The {NUM_HITS} nearest pictures of a caption, best first; right ones are outlined. "
            f"Found and missed among the first {NUM_HITS} in equal parts, where there are both."
        ),
        element("ul", *(_search(query, album) for query in asked), class_="searches"),
        element("h3", "Picture to texts", class_="direction"),
        element("ul", *(_reading(query, album) for query in seen), class_="cards"),
    )


def _name(query: Query) -> str:
    return query.query


def _is_found(query: Query) -> bool:
    return query.rank <= NUM_HITS


def _search(query: Query, album: Album) -> Html:
    hits = [_found(hit.target, album, hit.right) for hit in query.hits[:NUM_HITS]]
    wanted = None
    if not any(hit.right for hit in query.hits[:NUM_HITS]) and query.right:
        caption = element("figcaption", "wanted")
        wanted = element("figure", album.show(query.right[0]), caption, class_="hit wanted")
    title = element("h4", f"“{shorten(query.query, 160)}”", dir="auto")
    place = element("p", _place(query), class_="place")
    return element("li", title, place, element("div", *hits, wanted, class_="strip"))


def _place(query: Query) -> str:
    return "right at once" if query.rank == 1 else f"first right answer at place {query.rank:,}"


def _found(key: str, album: Album, is_right: bool) -> Html:
    picture = album.show(key, class_="positive" if is_right else "")
    says = element("figcaption", "✓ right") if is_right else None
    return element("figure", picture, says, class_="hit")


def _reading(query: Query, album: Album) -> Html:
    rows = [
        element("li", _mark(hit.right), shorten(hit.target, 160), class_="reading", dir="auto")
        for hit in query.hits[:5]
    ]
    if not any(hit.right for hit in query.hits[:5]) and query.right:
        wanted = element("span", "wanted: ", class_="label")
        rows.append(
            element("li", wanted, shorten(query.right[0], 160), class_="missed", dir="auto")
        )
    place = element("p", _place(query), class_="place")
    body = element("div", place, element("ol", *rows), class_="body")
    return element("li", album.show(query.query), body, class_="card")


def _captioned(details: Captions, album: Album) -> Html:
    chosen = spread(details.samples, NUM_CAPTIONED)
    constant = shorten(details.best_constant, 120)
    return join(
        _remark(
            "From the best to the worst by token F1, at equal distances; beneath, what people "
            f"wrote. The best caption for all at once, which sets the chance level: “{constant}”."
        ),
        _remark(f"People's own captions: {_people(details)}.") if details.people else None,
        element("ul", *(_caption(sample, album) for sample in chosen), class_="cards"),
    )


def _people(details: Captions) -> str:
    """What they reach in the metrics that need no reference."""
    return listed([f"{metric_name(n)} {metric(n, value)}" for n, value in details.people.items()])


def spread(samples: Sequence[Captioned], num: int) -> list[Captioned]:
    """`num` samples at equal distances from the best to the worst."""
    ordered = sorted(draw_lots(samples, lambda s: s.key, len(samples)), key=lambda s: -s.token_f1)
    if len(ordered) <= num:
        return ordered
    return [ordered[number * (len(ordered) - 1) // (num - 1)] for number in range(num)]


def _caption(sample: Captioned, album: Album) -> Html:
    generated = shorten(sample.generated) or "(nothing)"
    references = [
        element("li", shorten(text), dir="auto") for text in sample.references[:NUM_REFERENCES]
    ]
    body = element(
        "div",
        element("p", f"“{generated}”", class_="generated", dir="auto"),
        element("p", _agreement(sample), class_="place"),
        element("ul", *references, class_="references"),
        class_="body",
    )
    return element("li", album.show(sample.key), body, class_="card")


def _agreement(sample: Captioned) -> str:
    f1 = f"token F1 {percent(sample.token_f1)}"
    return f1 if sample.cider_d is None else f"{f1}, CIDEr-D {metric('cider_d', sample.cider_d)}"


def _confused(details: ZeroShot, album: Album) -> Html:
    pairs = details.confusions[:NUM_CONFUSIONS]
    if details.average_precision is not None:
        return _remark("A picture may have several classes here: none is taken for another.")
    if not pairs:
        return _remark("Not one picture was named wrong.")
    cards = [_pair(pair, details.samples, album) for pair in pairs]
    return join(
        draw_matrix(details.confusion_matrix) if details.confusion_matrix else None,
        _remark(
            "The most frequent mistakes: a picture that was named wrong, and one of the class it "
            "was taken for."
        ),
        element("ul", *cards, class_="pairs"),
    )


def _pair(pair: Confusion, samples: Sequence[Classified], album: Album) -> Html:
    mistaken = _first(s for s in samples if (s.truth, s.predicted) == (pair.truth, pair.predicted))
    other = _first(s for s in samples if s.truth == pair.predicted)
    times = element("span", "once" if pair.count == 1 else f"{pair.count:,} times", class_="times")
    arrow = element("span", "→", class_="arrow", aria_hidden="true")
    sides = [_side(mistaken, pair.truth, album), arrow, _side(other, pair.predicted, album)]
    return element("li", *sides, times, class_="pair")


def _first(samples: Iterable[Classified]) -> Classified | None:
    return next(iter(samples), None)


def _side(sample: Classified | None, name: str, album: Album) -> Html:
    picture = None if sample is None else album.show(sample.key)
    caption = element("figcaption", shorten(name, 60), dir="auto")
    return element("figure", picture or element("span", class_="picture frame"), caption)


def _remark(text: str) -> Html:
    return element("p", text, class_="remark")
