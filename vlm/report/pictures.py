"""The pictures of a page: read again from their data set, made small, embedded up to a budget."""

import base64
import json
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image

from vlm.curate.source import open_data
from vlm.data.dataset import Dataset
from vlm.data.decode import decode_image
from vlm.data.samples import BadSample
from vlm.errors import VlmError
from vlm.report.html import Html, element, shorten

SIDE = 96  # pixels of the longer side; smaller pictures stay as they are
BUDGET_BYTES = 2_300_000  # of base64 on a page; what comes after it is left out
_SEVERAL = -1


@dataclass
class Album:
    """The pictures of one data set, by key.

    Attributes:
        problem: Why there are none; empty if the data set was opened.
    """

    shelf: "Pictures"
    dataset: Dataset | None
    problem: str = ""
    sample_ids: dict[str, int] = field(default_factory=dict)
    made: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the data as it is now; empty if it was not opened."""
        return "" if self.dataset is None else self.dataset.fingerprint

    def show(self, key: str, *, class_: str = "") -> Html:
        """The picture of a sample, described by its first caption; or a frame that says why not."""
        classes = f"picture {class_}".strip()
        if self.dataset is None:
            return _frame("not available", key, classes)
        sample_id = self.sample_ids.get(key)
        if sample_id is None or sample_id == _SEVERAL:
            reason = "not in the data" if sample_id is None else "several have this key"
            return _frame(reason, key, classes)
        try:
            picture = self._small(sample_id)
        except BadSample as bad:
            return _frame(bad.reason, key, classes)
        if not self.shelf.take(len(picture["src"])):
            return _frame("left out: the page is full", key, classes)
        return element("img", class_=classes, title=key, **picture)

    def _small(self, sample_id: int) -> dict[str, Any]:
        """The attributes of a picture; made once, however often it is shown."""
        if sample_id not in self.made:
            assert self.dataset is not None
            sample = self.dataset.read(sample_id)
            data, (width, height) = thumbnail(sample.image)
            label = str(sample.meta.get("label", sample.key))
            self.made[sample_id] = {
                "src": f"data:image/webp;base64,{data}",
                "alt": shorten(sample.captions[0] if sample.captions else label),
                "width": width,
                "height": height,
            }
        return self.made[sample_id]


class Pictures:
    """Albums by DATA, each opened once, and the bytes that the page may still spend."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.left_bytes = budget_bytes
        self._albums: dict[str, Album] = {}

    def album(self, data: str | list[str]) -> Album:
        """The album of DATA; one without pictures if it cannot be opened."""
        name = json.dumps(data)
        if name not in self._albums:
            self._albums[name] = self._open(data)
        return self._albums[name]

    def take(self, num_bytes: int) -> bool:
        """Spend some of the budget, if enough is left."""
        if num_bytes > self.left_bytes:
            return False
        self.left_bytes -= num_bytes
        return True

    def _open(self, data: str | list[str]) -> Album:
        try:
            dataset = open_data(data, log=lambda line: None)
        except VlmError as error:
            return Album(self, None, error.problems[0])
        ids: dict[str, int] = {}
        for sample_id in range(len(dataset)):  # a key names one sample of a shard, not of the data
            key = dataset.key(sample_id)
            ids[key] = _SEVERAL if key in ids else sample_id
        return Album(self, dataset, "", ids)


def thumbnail(image: bytes) -> tuple[str, tuple[int, int]]:
    """A picture as base64 of a WebP of at most `SIDE` pixels a side, and its size.

    Raises:
        BadSample: It cannot be decoded.
    """
    picture = decode_image(image, min_size=SIDE)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=85, method=4)
    return base64.b64encode(buffer.getvalue()).decode(), picture.size


def _frame(reason: str, key: str, classes: str) -> Html:
    label = f"no picture of {shorten(key, 60)}: {reason}"
    return element("span", reason, class_=f"{classes} frame", role="img", aria_label=label)
