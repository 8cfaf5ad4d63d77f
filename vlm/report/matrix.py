"""A confusion matrix as a small picture: a row a true class, a column what it was taken for."""

import base64
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from vlm.report.html import Html, element
from vlm.report.numbers import percent

SIDE = 320  # pixels, about
_INK = (60, 100, 200)


def draw_matrix(matrix: Sequence[Sequence[int]]) -> Html:
    """The matrix as a figure: the darker a cell, the larger its share of its row.

    The picture is transparent where a share is 0, and so fits a light and a dark page.
    """
    counts = np.array(matrix, dtype=np.float64)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    cells = np.zeros((*shares.shape, 4), dtype=np.uint8)
    cells[..., :3] = _INK
    cells[..., 3] = np.round(255 * np.sqrt(shares))  # the root shows small shares, too
    size = max(1, SIDE // len(counts)) * len(counts)
    buffer = BytesIO()
    picture = Image.fromarray(cells).resize((size, size), Image.Resampling.NEAREST)
    picture.save(buffer, "WEBP", lossless=True)
    right = percent(float(counts.trace() / max(counts.sum(), 1)))
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    alt = f"confusion matrix of {len(counts)} classes"
    image = element("img", class_="matrix", src=source, alt=alt, width=size, height=size)
    text = (
        f"A row is one of the {len(counts)} classes in their order, a column what its pictures "
        f"were taken for. On the diagonal lie the {right} that are right."
    )
    return element("figure", image, element("figcaption", text, class_="remark"))
