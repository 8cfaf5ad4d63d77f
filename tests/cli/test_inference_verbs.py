import csv
import io
import json
import subprocess
import sys

import pytest
from PIL import Image
from webdataset import TarWriter

from vlm.cli.main import main
from vlm.retrieval.tables import new_csv, safe_cell

COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with") / "model"
    model.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(encoded, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "squares-0000.tar"
    with TarWriter(str(path)) as writer:
        for colour in COLOURS:
            meta = {"captions": [f"[bold]a {colour}\x1b[31m square"], "label": colour}
            writer.write(
                {
                    "__key__": f"=1+{colour}",
                    "png": encoded(colour),
                    "json": json.dumps(meta).encode(),
                }
            )
    return str(path)


@pytest.fixture(scope="module")
def index(folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "squares"
    assert main(["index", folder, data, str(out)]) == 0
    return str(out)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_classify_prints_csv_with_ranked_labels(folder, data, capsys):
    assert (
        main(["classify", folder, data, "--labels", "red, green,blue", "--templates", "none"]) == 0
    )
    rows = rows_of(capsys.readouterr().out)
    assert [row["key"] for row in rows] == ["'=1+red", "'=1+green", "'=1+blue"]
    assert list(rows[0]) == [
        "key", "path",
        "label", "probability", "label_2", "probability_2", "label_3", "probability_3",
    ]  # fmt: skip
    for row in rows:
        assert {row["label"], row["label_2"], row["label_3"]} == set(COLOURS)
        total = sum(float(row[name]) for name in row if name.startswith("probability"))
        assert total == pytest.approx(1, abs=1e-5)


def test_rows_name_the_files_of_a_folder(folder, tmp_path, capsys):
    for name in ("b/red one.png", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    assert main(["classify", folder, str(tmp_path), "--labels", "red,blue"]) == 0
    assert [row["path"] for row in rows_of(capsys.readouterr().out)] == ["a.png", "b/red one.png"]


def test_classify_says_what_python_says(folder, data, tmp_path, capsys):
    from vlm.data.dataset import open_shards
    from vlm.hub.load import load

    out = tmp_path / "out.csv"
    (tmp_path / "labels.txt").write_text("red\nblue\n\n")
    command = [
        "classify",
        folder,
        data,
        "--labels-file",
        str(tmp_path / "labels.txt"),
        "--out",
        str(out),
    ]
    assert main(command) == 0
    images = [open_shards(data).read(i).image for i in range(3)]
    expected = load(folder, "cpu").classify(images, ["red", "blue"])
    assert [row["label"] for row in rows_of(out.read_text())] == [p.label for p in expected]
    assert main(command) == 2
    assert f"error: {out} exists" in capsys.readouterr().err


def test_classify_knows_sets_by_name(folder, data, capsys):
    assert main(["classify", folder, data, "--labels-file", "cifar10"]) == 0
    names = {row[f"label{n}"] for row in rows_of(capsys.readouterr().out) for n in ("", "_2")}
    assert names < {
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    }  # fmt: skip


def test_classify_takes_one_image_file(folder, encoded, tmp_path, capsys):
    path = tmp_path / "red.png"
    path.write_bytes(encoded("red"))
    assert main(["classify", folder, str(path), "--labels", "red,blue"]) == 0
    assert rows_of(capsys.readouterr().out)[0]["key"] == "red.png"
    path.write_bytes(b"no picture")
    assert main(["classify", folder, str(path), "--labels", "red,blue"]) == 3
    captured = capsys.readouterr()
    assert f"{path}: no readable picture" in captured.err
    assert captured.out == ""


def test_a_column_of_an_image_file_is_refused(folder, encoded, tmp_path, capsys):
    path = tmp_path / "red.png"
    path.write_bytes(encoded("red"))
    assert main(["caption", folder, str(path), "--image-column", "a"]) == 2
    assert 'column "a" is for tables' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "red,red"], "label 'red' is given more than once"),
        (["--labels", ""], "label 1 of 1 is blank"),
        (["--labels-file", "none.txt"], "labels file none.txt: can't be read"),
        (["--labels", "a,b", "--templates", "simpel"], "did you mean simple?"),
        ([], "one of the arguments --labels --labels-file is required"),
        (["--labels", "a", "--labels-file", "b"], "not allowed with"),
    ],
)
def test_classify_names_what_is_wrong(folder, data, arguments, message, capsys):
    assert main(["classify", folder, data, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_caption_prints_what_python_says(folder, data, capsys):
    from vlm.data.dataset import open_shards
    from vlm.hub.load import load

    assert main(["caption", folder, data, "--prompt", "a"]) == 0
    rows = rows_of(capsys.readouterr().out)
    images = [open_shards(data).read(i).image for i in range(3)]
    expected = [safe_cell(text) for text in load(folder, "cpu").caption(images, prompt="a")]
    assert [row["caption"] for row in rows] == expected


def test_caption_without_a_captioner_says_how_to_train_one(make_model, data, tmp_path, capsys):
    make_model(captioner=False).save(tmp_path / "model")
    assert main(["caption", str(tmp_path / "model"), data]) == 2
    assert "no captioner; train one: vlm train" in capsys.readouterr().err


def test_eval_writes_results(folder, data, tmp_path, capsys):
    suite, out = tmp_path / "suite.yaml", tmp_path / "out.json"
    suite.write_text(f"tasks: [{{task: zero_shot, split: val, data: {data}, templates: none}}]")
    assert main(["eval", folder, str(suite), "--out", str(out)]) == 0
    assert "zero_shot" in capsys.readouterr().out
    assert json.loads(out.read_text())[0]["metric"] == "acc1"
    assert main(["eval", folder, str(suite), "--out", str(out)]) == 0
    assert "zero_shot-val: is finished already" in capsys.readouterr().out


def test_eval_does_not_replace_what_others_measured(folder, make_model, data, tmp_path, capsys):
    suite, out = tmp_path / "suite.yaml", tmp_path / "out.json"
    suite.write_text(f"tasks: [{{task: zero_shot, split: val, data: {data}, templates: none}}]")
    assert main(["eval", folder, str(suite), "--out", str(out)]) == 0
    before = out.read_text()
    make_model(captioner=False).save(tmp_path / "another")
    assert main(["eval", str(tmp_path / "another"), str(suite), "--out", str(out)]) == 2
    assert f"{out} holds results of another model" in capsys.readouterr().err
    suite.write_text(f"tasks: [{{task: retrieval, split: val, data: {data}}}]")
    assert main(["eval", folder, str(suite), "--out", str(out)]) == 2
    assert "holds results of zero_shot-val, which the suite has not" in capsys.readouterr().err
    assert out.read_text() == before
    (tmp_path / "mine.md").write_text("# Mine")
    assert main(["eval", folder, str(suite), "--out", str(tmp_path / "mine.json")]) == 2
    assert "mine.md is no fragment of a model card" in capsys.readouterr().err


def test_eval_of_a_run_writes_its_results_once(model, data, tmp_path, capsys):
    run, suite = tmp_path / "run", tmp_path / "suite.yaml"
    model.save(run / "model")
    (run / "config.yaml").touch()
    suite.write_text(f"tasks: [{{task: zero_shot, split: val, data: {data}, templates: none}}]")
    assert main(["eval", str(run), str(suite)]) == 0
    assert f"written: {run}/results.json" in capsys.readouterr().out
    assert json.loads((run / "eval/zero_shot-val.json").read_text())["fingerprint"]
    (run / "results.json").write_text("another suite's")
    assert main(["eval", str(run), str(suite)]) == 0
    said = f"not written: {run}/results.json holds no results, and is kept"
    assert said in capsys.readouterr().out
    assert (run / "results.json").read_text() == "another suite's"
    assert main(["eval", str(run), "emojy"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "did you mean emoji?" in captured.err


def test_search_prints_a_table_that_captions_cannot_paint(index, capsys):
    assert main(["search", index, "a red square", "-k", "2"]) == 0
    out = capsys.readouterr().out
    assert "[bold]a" in out
    assert "\x1b" not in out


def test_search_prints_json(index, capsys):
    assert main(["search", index, "red", "--json", "--where", 'label in ["red", "blue"]']) == 0
    hits = json.loads(capsys.readouterr().out)
    assert {hit["meta"]["label"] for hit in hits} == {"red", "blue"}
    assert list(hits[0]) == ["key", "score", "caption", "meta"]


def test_search_by_an_image_file(index, encoded, tmp_path, capsys):
    path = tmp_path / "q.png"
    path.write_bytes(encoded("blue"))
    assert main(["search", index, str(path), "--json", "-k", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["meta"]["label"] == "blue"


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "gif"])
def test_search_by_a_picture_that_is_not_there_is_an_error(index, suffix, capsys):
    assert main(["search", index, f"photos/none.{suffix}"]) == 2
    assert capsys.readouterr().err == f"error: no such picture: photos/none.{suffix}\n"


def test_search_writes_a_page_where_nothing_was(index, tmp_path, capsys):
    page = tmp_path / "page.html"
    command = ["search", index, "<script>alert(1)</script>", "--html", str(page)]
    assert main(command) == 0
    text = page.read_text()
    assert "<script" not in text
    assert "padding: 0 1.5rem" in text  # of the page, at every width
    assert text.count("data:image/webp;base64,") == 3
    assert main(command) == 2


@pytest.mark.parametrize(
    ("where", "message"),
    [("lable == 1", "did you mean label?"), ("open('x')", "where: "), ("label ==", "where: ")],
)
def test_search_names_what_is_wrong_with_a_filter(index, where, message, capsys):
    assert main(["search", index, "red", "--where", where]) == 2
    assert message in capsys.readouterr().err


def test_index_refuses_a_folder_that_holds_something(folder, data, index, capsys):
    assert main(["index", folder, data, index]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\tx", "\uff1d1"])
def test_a_cell_is_never_a_formula(text):
    assert safe_cell(text) == f"'{text}"
    assert safe_cell("a=1") == "a=1"
    assert safe_cell(-1.5) == -1.5


def test_a_csv_that_is_not_finished_is_removed(tmp_path):
    path = tmp_path / "x.csv"
    with pytest.raises(ZeroDivisionError), new_csv(path, ["a"]) as write:
        write([1 / (write([1]) or 0)])
    assert not path.exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom vlm.cli.main import main\n"
        "for verb in ('eval', 'classify', 'caption', 'index', 'search'):\n"
        "    assert main([verb, '--help']) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'rich' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
