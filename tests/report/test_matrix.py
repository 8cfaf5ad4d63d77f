import base64
import io

import numpy as np
from PIL import Image

from vlm.report.matrix import SIDE, draw_matrix


def cells(page):
    (image,) = page.of_class("matrix")
    data = base64.b64decode(image["src"].removeprefix("data:image/webp;base64,"))
    return np.array(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 3]


def test_a_matrix_shows_the_share_of_each_row(parse):
    page = parse(draw_matrix([[3, 1], [0, 0]]))
    shown = cells(page)
    size = len(shown) // 2
    corners = shown[[size // 2, size // 2, -1, -1], [size // 2, -1, size // 2, -1]]
    assert corners.tolist() == [round(255 * 0.75**0.5), round(255 * 0.25**0.5), 0, 0]
    assert "75.0% that are right" in page.text
    assert page.all("img")[0]["alt"] == "confusion matrix of 2 classes"


def test_every_class_has_whole_pixels(parse):
    for num_classes in (1, 3, 200):
        shown = cells(parse(draw_matrix(np.eye(num_classes, dtype=int).tolist())))
        assert len(shown) % num_classes == 0
        assert len(shown) <= SIDE
        assert (shown.diagonal() == 255).all()
