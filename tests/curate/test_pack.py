"""Folders and tables become shards that read back as what was put in."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vlm.curate.listing import Listing, Picture, list_folder
from vlm.curate.pack import pack
from vlm.curate.tables import list_table
from vlm.data.dataset import Dataset, open_shards
from vlm.data.samples import Sample
from vlm.errors import ConfigError, DataError, DiskError

MakePicture = Callable[..., bytes]


def silent(line: str) -> None:
    pytest.fail(f"nothing to tell, but: {line}")


def packed(listing: Listing, out: Path, **options: Any) -> Dataset:
    pack(listing, out, **options)
    return open_shards(str(out / "*.tar"), log=silent)


def read_all(dataset: Dataset) -> dict[str, Sample]:
    """Samples by the path that their meta keeps."""
    found = [dataset.read(sample_id) for sample_id in range(len(dataset))]
    return {sample.meta["path"]: sample for sample in found}


# --- folders ---


def test_sidecars_speak_for_their_picture(tmp_path: Path, make_picture: MakePicture) -> None:
    image = make_picture("in/a.jpg", 1)
    make_picture("in/sub/b.c.png", 2)
    make_picture("in/alone.webp", 3)
    (tmp_path / "in/a.txt").write_text("  a cat \n")
    (tmp_path / "in/sub/b.c.json").write_text('{"captions": ["x", "y"], "label": "dog", "n": 3}')
    (tmp_path / "in/sub/b.c.cls").write_text("4")
    (tmp_path / "in/notes.txt").write_text("of no picture")
    samples = read_all(packed(list_folder(tmp_path / "in"), tmp_path / "out"))
    assert samples["a.jpg"].captions == ("a cat",)
    assert samples["a.jpg"].image == image
    assert samples["alone.webp"].captions == ()
    assert samples["sub/b.c.png"].captions == ("x", "y")
    assert samples["sub/b.c.png"].meta == {"label": "dog", "n": 3, "cls": 4, "path": "sub/b.c.png"}


def test_without_sidecars_the_first_subfolder_is_the_label(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    for number, name in enumerate(("dog/1.png", "cat/deep/2.png", "cat/3.png", "4.png")):
        make_picture(f"in/{name}", number)
    samples = read_all(packed(list_folder(tmp_path / "in"), tmp_path / "out"))
    assert samples["dog/1.png"].meta == {"label": "dog", "cls": 1, "path": "dog/1.png"}
    assert samples["cat/deep/2.png"].meta["label"] == "cat"
    assert samples["cat/3.png"].meta["cls"] == 0
    assert samples["4.png"].meta == {"path": "4.png"}


def test_hidden_files_and_loops_of_links_are_passed_over(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("in/a/1.png")
    make_picture("in/.thumbnails/1.png")
    make_picture("in/a/._1.png", form="PNG")
    (tmp_path / "in/a/loop").symlink_to(tmp_path / "in")
    assert [picture.name for picture in list_folder(tmp_path / "in").pictures] == ["a/1.png"]


def test_a_bad_sidecar_leaves_its_picture_out_and_is_told(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("in/a.png")
    make_picture("in/b.png")
    (tmp_path / "in/a.json").write_text("{")
    listing = list_folder(tmp_path / "in")
    assert [picture.name for picture in listing.pictures] == ["b.png"]
    assert listing.skipped.counts == {"text.json": 1}
    assert next(listing.skipped.lines()).startswith("1 text.json: a.png: its json cannot be read")


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no picture in this folder (jpg, jpeg, png, webp, gif, bmp, tif, tiff)"
    )


# --- tables ---

ROWS = [
    {"Image": "a.png", "Title": "a cat"},
    {"Image": "b.png", "Title": "a dog"},
    {"Image": "a.png", "Title": "one cat"},
    {"Image": "a.png", "Title": "a cat"},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [list(rows[0]), *(row.values() for row in rows)]
        path.write_text("".join(mark.join(map(str, line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_one_image_become_captions_of_one_sample(
    tmp_path: Path, make_picture: MakePicture, suffix: str
) -> None:
    image = make_picture("a.png", 1)
    make_picture("b.png", 2)
    lines: list[str] = []
    table = write_table(tmp_path / f"photos.{suffix}", ROWS)
    samples = read_all(packed(list_table(table, log=lines.append), tmp_path / "out"))
    assert lines == [f'photos.{suffix}: image column "Image", caption column "Title"']
    assert samples["a.png"].captions == ("a cat", "one cat")
    assert samples["a.png"].image == image
    assert samples["b.png"].captions == ("a dog",)


def test_a_csv_keeps_commas_quotes_and_line_breaks_of_a_caption(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("a.png")
    (tmp_path / "t.csv").write_bytes(
        '\ufefffile_name,text\r\n\r\na.png,"größe, ""quoted""\nsecond"\r\n'.encode()
    )
    listing = list_table(tmp_path / "t.csv", log=lambda line: None)
    assert [picture.captions for picture in listing.pictures] == [('größe, "quoted"\nsecond',)]


@pytest.mark.parametrize("mark", ["\t", ";"])
def test_a_csv_may_be_separated_otherwise(tmp_path: Path, mark: str) -> None:
    (tmp_path / "t.csv").write_text(f"filepath{mark}title\na.png{mark}one, two\n")
    listing = list_table(tmp_path / "t.csv", log=lambda line: None)
    assert listing.pictures[0].captions == ("one, two",)


def test_a_line_with_an_unquoted_comma_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\na.png,one\nb.png,one, two\n,three\n")
    listing = list_table(tmp_path / "t.csv", log=lambda line: None)
    assert [picture.name for picture in listing.pictures] == ["a.png"]
    assert list(listing.skipped.lines()) == [
        "1 row.cells: line 3 has 3 cells for 2 columns",
        "1 row.no_image: line 4",
    ]


def test_lists_of_captions_and_absent_ones(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "captions": ["x", " ", "y"]},
        {"image": "b.png", "captions": None},
        {"image": None, "captions": ["z"]},
    ]
    for suffix in ("jsonl", "parquet"):
        table = write_table(tmp_path / f"t.{suffix}", rows)
        listing = list_table(table, log=lambda line: None)
        assert [picture.captions for picture in listing.pictures] == [("x", "y"), ()]
        assert listing.skipped.counts == {"row.no_image": 1}


def test_broken_lines_of_a_jsonl_are_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "text": "x"}\n{"image"\n\n[1]\n')
    listing = list_table(tmp_path / "t.jsonl", log=lambda line: None)
    assert len(listing.pictures) == 1
    assert listing.skipped.counts == {"row.json": 2}


def test_labels_go_to_the_meta(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture("a.png")
    lines: list[str] = []
    table = write_table(tmp_path / "t.csv", [{"path": "a.png", "label": "cat"}])
    samples = read_all(packed(list_table(table, log=lines.append), tmp_path / "out"))
    assert lines == ['t.csv: image column "path", label column "label", no captions']
    assert samples["a.png"].meta == {"label": "cat", "path": "a.png"}


def test_one_image_with_two_labels_keeps_the_first_and_tells(tmp_path: Path) -> None:
    rows = [{"path": "a.png", "class": name} for name in ("cat", "dog")]
    listing = list_table(write_table(tmp_path / "t.csv", rows), log=lambda line: None)
    assert [picture.meta for picture in listing.pictures] == [{"class": "cat"}]
    assert list(listing.skipped.lines()) == ["1 row.other_label: line 3 of a.png"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_list_of_labels_stays_a_list(
    tmp_path: Path, make_picture: MakePicture, suffix: str
) -> None:
    make_picture("a.png")
    make_picture("b.png")
    labels = {"a.png": ["cat", "dog"], "b.png": []}
    rows = [{"path": name, "label": listed} for name, listed in labels.items()]
    table = write_table(tmp_path / f"t.{suffix}", rows)
    samples = read_all(packed(list_table(table, log=lambda line: None), tmp_path / "out"))
    assert {name: sample.meta["label"] for name, sample in samples.items()} == labels


def test_the_fields_of_a_jsonl_go_to_the_meta(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture("a.png")
    make_picture("b.png")
    lines: list[str] = []
    said = {
        "objects": [{"name": "cat", "box": [1, 2, 3, 4]}],
        "qa": [{"question": "who?", "answer": "a cat", "type": "who"}],
        "swap": {"caption": "x", "swapped": None},
        "concept": "größe",
        "similarity": 0.25,
        "pair": 3,
    }
    table = write_table(tmp_path / "t.jsonl", [{"image": "a.png", **said}, {"image": "b.png"}])
    samples = read_all(packed(list_table(table, log=lines.append), tmp_path / "out"))
    assert lines == ['t.jsonl: image column "image", no captions']
    assert samples["a.png"].meta == {**said, "path": "a.png"}
    assert samples["b.png"].meta == {"path": "b.png"}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_of_other_tables_labels_alone_go_to_the_meta(tmp_path: Path, suffix: str) -> None:
    rows = [{"image": "a.png", "text": "x", "label": "cat", "concept": "pet"}]
    listing = list_table(write_table(tmp_path / f"t.{suffix}", rows), log=lambda line: None)
    assert [picture.meta for picture in listing.pictures] == [{"label": "cat"}]


def test_a_jsonl_of_images_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot tell which column holds the caption"):
        list_table(write_table(tmp_path / "t.jsonl", [{"image": "a.png"}]), log=silent)


def test_rows_of_one_image_may_have_other_fields_that_differ(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "text": f"{n}", "label": "cat", "n": n} for n in range(2)]
    listing = list_table(write_table(tmp_path / "t.jsonl", rows), log=lambda line: None)
    assert [picture.meta for picture in listing.pictures] == [{"label": "cat", "n": 0}]
    assert listing.skipped.total == 0


@pytest.mark.parametrize("cls", [3, "dog", "3", True, 1.5, ["cat", 1], {"a": 1}])
def test_what_a_pack_says_itself_goes_before_the_fields_of_a_jsonl(
    tmp_path: Path, make_picture: MakePicture, cls: Any
) -> None:
    make_picture("a.png")
    row = {"image": "a.png", "en": None, "path": 5, "captions": [1], "caption": {}, "cls": cls}
    table = write_table(tmp_path / "t.jsonl", [row])
    listing = list_table(table, caption_column="en", log=lambda line: None)
    (sample,) = read_all(packed(listing, tmp_path / "out")).values()
    assert sample.captions == ()
    assert sample.meta == {"cls": cls, "path": "a.png"}
    assert type(sample.meta["cls"]) is type(cls)


def test_a_class_number_is_a_cls_as_in_clip_benchmarks_shards(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("a.png")
    listing = list_table(
        write_table(tmp_path / "t.jsonl", [{"image": "a.png", "cls": 3}]), log=lambda line: None
    )
    pack(listing, tmp_path / "out")
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        file = tar.extractfile("000000-a.cls")
        assert file is not None
        assert file.read() == b"3"


def test_a_number_of_a_jsonl_that_is_none_is_null(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("a.png")
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "x": NaN, "y": [1e999, 0.5]}')
    samples = read_all(
        packed(list_table(tmp_path / "t.jsonl", log=lambda line: None), tmp_path / "out")
    )
    assert samples["a.png"].meta == {"x": None, "y": [None, 0.5], "path": "a.png"}


def test_columns_can_be_named(tmp_path: Path) -> None:
    lines: list[str] = []
    table = write_table(tmp_path / "t.csv", [{"u": "a.png", "image": "x", "de": "x", "en": "y"}])
    listing = list_table(table, image_column="u", caption_column="de,en", log=lines.append)
    assert lines == ['t.csv: image column "u", caption columns "de", "en"']
    assert listing.pictures[0].captions == ("x", "y")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (
            "a,b",
            "t.csv: cannot tell which column holds the image and the caption; name it with "
            "--image-column NAME and --caption-column NAME "
            "(in a config: data.image_column=NAME data.caption_column=NAME; "
            "for an evaluation, vlm data pack takes the options); its columns are: a, b",
        ),
        (
            "image,b",
            "t.csv: cannot tell which column holds the caption; name it with "
            "--caption-column NAME (in a config: data.caption_column=NAME; "
            "for an evaluation, vlm data pack takes the option); its columns are: image, b",
        ),
        (
            "a,text",
            "t.csv: cannot tell which column holds the image; name it with "
            "--image-column NAME (in a config: data.image_column=NAME; "
            "for an evaluation, vlm data pack takes the option); its columns are: a, text",
        ),
        ("image,text,text", 't.csv: has several columns "text"; give each its own name'),
    ],
)
def test_columns_that_cannot_be_told_are_an_error(
    tmp_path: Path, header: str, problem: str
) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\n")
    with pytest.raises(DataError) as caught:
        list_table(tmp_path / "t.csv", log=silent)
    assert str(caught.value) == problem


@pytest.mark.parametrize(("name", "hint"), [("imge", "did you mean image? Its"), ("foo", "its")])
def test_a_named_column_that_does_not_exist_is_an_error(
    tmp_path: Path, name: str, hint: str
) -> None:
    table = write_table(tmp_path / "t.csv", [{"image": "a.png", "text": "x"}])
    with pytest.raises(ConfigError) as caught:
        list_table(table, image_column=name, log=silent)
    assert str(caught.value) == f't.csv: has no column "{name}"; {hint} columns are: image, text'


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", b"", "t.csv: is empty"),
        ("t.csv", b"image,text\na.png,sch\xf6n\n", "t.csv: cannot be read as CSV in UTF-8"),
        ("t.csv", b'image,text\na.png,"open\n', "t.csv: cannot be read as CSV in UTF-8"),
        ("t.parquet", b"PAR0", "t.parquet: cannot be read as Parquet"),
        ("t.jsonl", b"{\n", "t.jsonl: cannot tell which column holds the image"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^{problem}"):
        list_table(tmp_path / name, log=lambda line: None)


def test_a_parquet_that_holds_the_images_themselves_is_an_error(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [{"image": {"bytes": b"x"}, "text": "x"}])
    with pytest.raises(DataError, match='column "image" holds images, not paths'):
        list_table(table, log=lambda line: None)


# --- packing ---


def listed(tmp_path: Path, *names: str) -> Listing:
    return Listing("photos.csv", [Picture(tmp_path / name, name, ("x",)) for name in names])


def test_known_formats_keep_their_bytes_whatever_their_name_says(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    wrong = {"a.jpg": "PNG", "b.png": "WEBP", "c.bin": "GIF", "d": "JPEG"}
    images = {name: make_picture(name, 0, form) for name, form in wrong.items()}
    dataset = packed(listed(tmp_path, *wrong), tmp_path / "out")
    assert {name: sample.image for name, sample in read_all(dataset).items()} == images
    assert [dataset.image_suffix(i) for i in range(4)] == ["png", "webp", "gif", "jpg"]


@pytest.mark.parametrize("name", ["a.bmp", "a.tif"])
def test_other_formats_become_png_of_the_same_pixels(
    tmp_path: Path, make_picture: MakePicture, name: str
) -> None:
    original = Image.open(io.BytesIO(make_picture(name)))
    dataset = packed(listed(tmp_path, name), tmp_path / "out")
    image = Image.open(io.BytesIO(dataset.read(0).image))
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), np.asarray(original))


def test_what_cannot_be_packed_is_counted_with_examples(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("good.png")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "folder.jpg").mkdir()
    gone = [f"gone{i}.png" for i in range(5)]
    listing = listed(tmp_path, "good.png", "text.jpg", "folder.jpg", *gone)
    report = pack(listing, tmp_path / "out")
    assert (report["num_samples"], report["num_shards"]) == (1, 1)
    assert list(listing.skipped.lines()) == [
        "1 image.format: text.jpg (not a picture of a known format)",
        "6 image.missing: folder.jpg (is a folder), gone0.png (no such file), "
        "gone1.png (no such file), ...",
    ]
    assert json.loads((tmp_path / "out/pack.json").read_text()) == report


def test_all_images_missing_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        pack(listed(tmp_path, "a.png", "b.png"), tmp_path / "out")
    assert str(caught.value) == (
        "photos.csv: none of its 2 image files exists, such as a.png (no such file); "
        "paths are absolute or relative to the folder of the table"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture("a.png")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError) as caught:
        pack(listed(tmp_path, "a.png"), tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: exists, and packing never overwrites; name another folder"
    )


def test_a_place_that_cannot_be_written_is_an_error(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("a.png")
    with pytest.raises(DiskError, match=r"a\.png/out: cannot be written"):
        pack(listed(tmp_path, "a.png"), tmp_path / "a.png" / "out")


def test_packing_twice_gives_the_same_bytes(tmp_path: Path, make_picture: MakePicture) -> None:
    for number in range(3):
        make_picture(f"{number}.png", number)
    for out in ("one", "two"):
        pack(listed(tmp_path, "0.png", "1.png", "2.png"), tmp_path / out)
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()


def test_no_shard_is_larger_than_asked(tmp_path: Path, make_picture: MakePicture) -> None:
    names = [f"{number}.png" for number in range(40)]
    for number, name in enumerate(names):
        make_picture(name, number)
    dataset = packed(listed(tmp_path, *names), tmp_path / "out", shard_size_bytes=30_000)
    assert len(dataset.shards) > 1
    assert len(dataset) == 40
    assert all(shard.size_bytes <= 30_000 for shard in dataset.shards)
    assert list(read_all(dataset)) == names


def test_names_of_any_kind_give_unique_plain_keys(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    names = ["猫.png", "a b.c.png", "a.b.png", "é" * 90 + ".png", "x" * 200 + ".png", "__x__.png"]
    for number, name in enumerate(names):
        make_picture(name, number)
    dataset = packed(listed(tmp_path, *names), tmp_path / "out")
    keys = [dataset.key(i) for i in range(len(names))]
    assert len(set(keys)) == len(names)
    assert all(key.isascii() and "." not in key for key in keys)
    assert list(read_all(dataset)) == names


def test_a_name_that_is_not_utf8_is_packed(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture("in/a.png")
    os.rename(tmp_path / "in/a.png", os.fsencode(tmp_path / "in") + b"/\xff.png")
    dataset = packed(list_folder(tmp_path / "in"), tmp_path / "out")
    assert dataset.read(0).meta == {"path": "\ufffd.png"}


def test_half_a_character_in_a_caption_is_left_out_and_told(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("a.png")
    listing = listed(tmp_path, "a.png")
    listing.pictures.append(Picture(tmp_path / "a.png", "a.png", ("\ud800",)))
    assert pack(listing, tmp_path / "out")["num_samples"] == 1
    assert listing.skipped.counts == {"text.encoding": 1}


def test_a_meta_that_is_nested_too_deeply_is_left_out_and_told(
    tmp_path: Path, make_picture: MakePicture
) -> None:
    make_picture("a.png")
    listing = listed(tmp_path, "a.png")
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    listing.pictures.append(Picture(tmp_path / "a.png", "a.png", (), {"x": deep}))
    assert pack(listing, tmp_path / "out")["num_samples"] == 1
    assert listing.skipped.counts == {"text.json": 1}


def test_webdataset_reads_what_was_packed(tmp_path: Path, make_picture: MakePicture) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    image = make_picture("a.png")
    pack(listed(tmp_path, "a.png"), tmp_path / "out")
    with (tmp_path / "out/00000.tar").open("rb") as stream:
        (sample,) = group_by_keys(tar_file_expander([{"url": "x", "stream": stream}]))
    assert (sample["__key__"], sample["png"]) == ("000000-a", image)
    assert json.loads(sample["json"]) == {"captions": ["x"], "path": "a.png"}
