import io
import json

import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from vlm.data.dataset import open_shards
from vlm.data.transforms import EvalTransform
from vlm.errors import DataError
from vlm.eval.grounding import boxes, evenly_spaced, grounding, relevance_in
from vlm.eval.source import Source
from vlm.eval.suite import evaluate
from vlm.retrieval.embed import Item


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scenes(painted, tmp_path_factory):
    """Four pictures of squares, twice as large as the model sees them; one without objects."""
    path = tmp_path_factory.mktemp("data") / "scenes-0000.tar"
    with TarWriter(str(path)) as writer:
        for seed in range(4):
            picture, objects = painted(seed)
            for thing in objects:
                thing["box"] = [2 * side for side in thing["box"]]
            large = picture.repeat(2, axis=0).repeat(2, axis=1)
            meta = {"captions": ["squares"], "objects": objects if seed else []}
            fields = {"png": png(large), "json": json.dumps(meta).encode()}
            writer.write({"__key__": f"scene-{seed}", **fields})
    return str(path)


def test_relevance_lies_in_the_box_of_what_is_named_and_not_with_fresh_weights(
    learned, scenes, tmp_path
):
    (tmp_path / "suite.yaml").write_text(
        f"tasks: [{{task: explain, split: val, data: {scenes}, template: 'a {{}} square'}}]"
    )
    lines = []
    results = evaluate(
        learned, tmp_path / "suite.yaml", out=tmp_path / "results.json", log=lines.append
    )
    rows = {row["metric"]: row for row in results}
    assert list(rows) == ["relevance_in_box", "relevance_in_box_fresh", "deletion", "insertion"]
    assert rows["relevance_in_box"]["value"] > 4
    assert rows["relevance_in_box_fresh"]["value"] == pytest.approx(1, abs=0.2)
    assert rows["deletion"]["value"] < rows["deletion"]["chance"] < rows["insertion"]["value"]
    assert {row["n"] for row in results} == {6}
    details = json.loads((tmp_path / "eval" / "explain-val.json").read_text())
    assert details["num_without_objects"] == 1
    assert details["samples"][0]["area_share"] == pytest.approx(1 / 16)


def test_data_without_objects_is_an_error(model, shards):
    with pytest.raises(DataError, match=r"none of 3 pictures shows an object .* in `objects`"):
        grounding(Source(model, open_shards(str(shards)), log=lambda _: None), num_pictures=3)


def test_boxes_follow_the_picture_into_the_models():
    """120 x 60 becomes 64 x 32, of which the middle 32 x 32 stay: x from 16 to 48."""
    objects = [
        {"name": "cat", "box": [30, 0, 60, 60], "colour": "black"},
        {"name": "cat", "box": [75, 30, 120, 60]},
        {"name": "dog", "box": [0, 0, 20, 60]},
    ]
    inside = boxes(Item("a", (), {"objects": objects}), (120, 60), EvalTransform(32))
    assert list(inside) == ["cat"]
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[:, :16] = True
    expected[16:, 24:] = True
    assert torch.equal(inside["cat"], expected)


def test_an_even_map_has_its_area_share_in_any_box():
    inside = torch.zeros(30, 30, dtype=torch.bool)
    inside[3:11, 7:20] = True
    assert relevance_in(torch.full((4, 4), 1 / 16), inside) == pytest.approx(1)
    one = torch.zeros(2, 2)
    one[0, 0] = 1
    corner = torch.zeros(30, 30, dtype=torch.bool)
    corner[:5, :30] = True
    assert relevance_in(one, corner) == pytest.approx(2)


@pytest.mark.parametrize(
    ("thing", "problem"),
    [
        ({"name": "cat", "box": [1, 2, 3]}, r"objects\.0\.box"),
        ({"box": [1, 2, 3, 4]}, r"objects\.0\.name"),
        ({"name": "cat", "box": [1, 2, 3, float("nan")]}, r"objects\.0\.box\.3"),
        ("cat", r"objects\.0"),
    ],
)
def test_a_malformed_object_is_named(thing, problem):
    with pytest.raises(DataError, match=rf"sample 'a': {problem}") as error:
        boxes(Item("a", (), {"objects": [thing]}), (32, 32), EvalTransform(32))
    assert len(error.value.problems) == 1


def test_pictures_are_taken_evenly(shards):
    dataset = open_shards(str(shards))
    assert evenly_spaced(dataset, 99) is dataset
    some = evenly_spaced(dataset, 3)
    assert [some.key(i) for i in range(3)] == ["0-red", "1-red", "broken"]
