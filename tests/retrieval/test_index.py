import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vlm.data.dataset import open_shards
from vlm.errors import ConfigError, DataError
from vlm.retrieval import build
from vlm.retrieval.index import Index
from vlm.retrieval.manifest import Manifest, exclusive


@pytest.fixture(scope="session")
def built(model, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "squares"
    Index.build(model, open_shards(str(shards)), folder, log=lambda _: None)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy of its own, elsewhere."""
    return shutil.copytree(built, tmp_path / "copy")


def test_a_search_equals_brute_force_over_the_features(model, shards, folder):
    dataset = open_shards(str(shards))
    samples = [dataset.read(i) for i in range(12)]
    features = model.embed_images([sample.image for sample in samples])
    scores = features @ model.embed_texts("a red square")[0]
    hits = Index.open(folder).search("a red square", k=12)
    expected = sorted(zip(scores.tolist(), (s.key for s in samples), strict=True), reverse=True)
    # fp16 vectors: 11 bits of mantissa, so each cosine is within 2^-11 of the exact one.
    assert [hit.score for hit in hits] == pytest.approx([score for score, _ in expected], abs=5e-4)
    by_key = {key: score for score, key in expected}
    assert all(hit.score == pytest.approx(by_key[hit.key], abs=5e-4) for hit in hits)


def test_a_hit_has_all_that_is_shown(folder, shards):
    hit = Index.open(folder).search("a red square", k=12, where='label == "red" and artist == 1')[0]
    assert hit.key == "1-red"
    assert hit.caption == "a red square"
    assert hit.meta == {"label": "red", "concept": "red", "artist": 1}
    (folder / "thumbnail.webp").write_bytes(hit.thumbnail)
    with Image.open(folder / "thumbnail.webp") as image:
        assert image.size == (40, 36)  # the whole picture, not the model's square


def test_a_picture_finds_itself(folder, shards, tmp_path):
    picture = tmp_path / "query.png"
    picture.write_bytes(open_shards(str(shards)).read(2).image)
    index = Index.open(folder)
    for query in (picture, Image.open(picture)):
        hits = index.search(query, k=2)
        assert {hit.meta["label"] for hit in hits} == {"blue"}
        assert hits[0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ('label == "red"', {"0-red", "1-red"}),
        ('artist == 0 and label in ["red", "blue"]', {"0-red", "0-blue"}),
        ("artist > 5", set()),
    ],
)
def test_a_filter_limits_what_can_be_found(folder, where, keys):
    assert {hit.key for hit in Index.open(folder).search("red", k=5, where=where)} == keys


def test_an_unknown_field_is_named_with_the_nearest_one(folder):
    with pytest.raises(ConfigError, match=r"'lable'.*did you mean label\?"):
        Index.open(folder).search("red", where='lable == "red"')


def test_the_unreadable_picture_is_left_out_and_counted(model, shards, tmp_path):
    lines = []
    index = Index.build(model, open_shards(str(shards)), tmp_path / "i", log=lines.append)
    assert len(index) == 12
    assert any(line.startswith("1 of 13 samples skipped: 1 image.") for line in lines)


def test_an_index_is_never_overwritten(model, shards, folder):
    with pytest.raises(ConfigError, match="exists"):
        Index.build(model, open_shards(str(shards)), folder)


def test_a_failed_build_leaves_nothing(model, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "thumbnail", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Index.build(model, open_shards(str(shards)), tmp_path / "i")
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_readable_picture_is_an_error(model, shards, tmp_path):
    dataset = open_shards(str(shards))
    broken = dataset.select(np.arange(len(dataset)) == 12)
    with pytest.raises(DataError, match=r"no picture can be read: 1 image\."):
        Index.build(model, broken, tmp_path / "i", log=lambda _: None)


def halves(shards):
    dataset = open_shards(str(shards))
    first = np.arange(len(dataset)) < 6
    return dataset.select(first), dataset.select(~first)


def test_segments_give_the_hits_of_one_segment(model, shards, folder, tmp_path, monkeypatch):
    whole = Index.open(folder).search("a blue square", k=12)
    first, second = halves(shards)
    index = Index.build(model, first, tmp_path / "parts", log=lambda _: None)
    monkeypatch.setattr(build, "SEGMENT_ROWS", 2)
    monkeypatch.setattr(build, "BATCH_SIZE", 2)
    assert index.add(second, log=lambda _: None) == 6
    assert len(index._segments) == 4
    found = Index.open(tmp_path / "parts").search("a blue square", k=12)
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in whole], abs=1e-3)
    assert {hit.key for hit in found} == {hit.key for hit in whole}


def test_rows_are_found_across_row_groups(model, shards, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_SIZE", 5)
    index = Index.build(model, open_shards(str(shards)), tmp_path / "i", log=lambda _: None)
    assert {h.key: h.meta for h in index.search("red", k=12)} == {
        h.key: h.meta for h in Index.open(folder).search("red", k=12)
    }


def test_the_same_data_is_not_added_twice(shards, folder):
    with pytest.raises(ConfigError, match="already"):
        Index.open(folder).add(open_shards(str(shards)))


def test_a_deleted_key_is_not_found_until_it_is_added_again(shards, folder):
    index = Index.open(folder)
    assert index.delete(["0-red", "1-red"]) == 2
    for reader in (index, Index.open(folder)):
        assert len(reader) == 10
        assert {h.meta["label"] for h in reader.search("a red square", k=12)}.isdisjoint({"red"})
        assert reader.search("red", where='label == "red"') == []
    with pytest.raises(ConfigError, match="no picture has the key '0-red'"):
        index.delete(["0-red"])
    index.add(halves(shards)[0], log=lambda _: None)
    assert [h.key for h in Index.open(folder).search("red", where='label == "red"')] == ["0-red"]


def keys_of(index):
    return sorted(hit.key for hit in index.search("a square", k=50))


def test_of_the_same_data_only_what_was_deleted_is_added_again(shards, folder):
    dataset, index = open_shards(str(shards)), Index.open(folder)
    whole = keys_of(index)
    for deleted in (["0-red", "1-blue"], ["1-blue"], whole):
        index.delete(deleted)
        assert index.add(dataset, log=lambda _: None) == len(deleted)
        assert keys_of(Index.open(folder)) == whole
        with pytest.raises(ConfigError, match="this data is in the index already"):
            index.add(dataset, log=lambda _: None)


def test_a_deletion_of_other_data_lets_nothing_be_added_twice(model, shards, tmp_path):
    first, second = halves(shards)
    index = Index.build(model, first, tmp_path / "i", log=lambda _: None)
    index.add(second, log=lambda _: None)
    index.delete(["1-red"])  # of the second half
    with pytest.raises(ConfigError, match="this data is in the index already"):
        index.add(first, log=lambda _: None)
    assert index.add(second, log=lambda _: None) == 1
    assert len(keys_of(index)) == len(set(keys_of(index))) == 12


def test_what_was_written_is_never_edited(shards, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    index = Index.open(folder)
    index.delete(["0-red"])
    index.add(halves(shards)[0], log=lambda _: None)
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"index.json"}
    index.verify()


def test_a_writer_that_dies_before_its_commit_changes_nothing(shards, folder, monkeypatch):
    index = Index.open(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index.add(halves(shards)[0], log=lambda _: None)
        with pytest.raises(ZeroDivisionError):
            index.delete(["0-red"])
    assert len(Index.open(folder)) == 12
    assert index.add(halves(shards)[0], log=lambda _: None) == 6  # beside what was left behind
    assert index.delete(["0-red"]) == 2
    assert len(Index.open(folder)) == 16


def test_two_writers_do_not_mix(folder):
    with exclusive(folder), pytest.raises(ConfigError, match="another process"):
        Index.open(folder).delete(["0-red"])


FILES = [
    "index.json",
    "model/model.safetensors",
    "segment-000000/rows.parquet",
    "segment-000000/vectors.faiss",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        Index.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_named(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=name):
        Index.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_other_bytes_of_the_same_size_are_found(folder, name):
    data = bytearray((folder / name).read_bytes())
    position = data.index(b'"model_sha256": "') + 17 if name == "index.json" else len(data) // 2
    data[position] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        Index.open(folder).verify()


def test_a_foreign_model_is_refused_at_the_first_query(folder):
    path = folder / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        Index.open(folder).search("red")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../../etc"),
        ("name", 3),
        ("num_rows", 99),
        ("files", {"../x": {}}),
        ("files", None),
    ],
)
def test_a_hostile_manifest_is_damage(folder, key, value):
    path = folder / "index.json"
    manifest = json.loads(path.read_bytes())
    manifest["segments"][0][key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged"):
        Index.open(folder)


def test_no_such_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="vlm index MODEL DATA"):
        Index.open(tmp_path / "none")


@pytest.mark.parametrize(("query", "k"), [("  ", 10), ("red", 0)])
def test_wrong_queries_are_refused(folder, query, k):
    with pytest.raises(ConfigError):
        Index.open(folder).search(query, k)


def test_a_query_that_is_no_picture_is_named(folder, tmp_path):
    path = tmp_path / "fake.png"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"fake\.png"):
        Index.open(folder).search(path)


def test_parquet_alone_holds_everything(folder):
    table = pq.read_table(folder / "segment-000000/rows.parquet")
    assert table.column_names == ["key", "vector", "captions", "meta", "thumbnail"]
    vectors = torch.tensor(np.array(table["vector"].to_pylist(), dtype=np.float32))
    assert vectors.norm(dim=1).tolist() == pytest.approx([1] * 12, abs=1e-3)
