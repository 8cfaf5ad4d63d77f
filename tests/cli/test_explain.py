import pytest
from PIL import Image

from vlm.cli.main import main


@pytest.fixture(scope="module")
def words(model, encoded, tmp_path_factory):
    """What all commands here begin with."""
    folder = tmp_path_factory.mktemp("explain")
    model.save(folder / "model")
    (folder / "red.png").write_bytes(encoded("red"))
    return ["explain", str(folder / "model"), str(folder / "red.png"), "A [bold]red square"]


def test_it_prints_words_and_writes_a_picture(words, tmp_path, capsys):
    out = tmp_path / "overlay.png"
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("similarity ")
    assert "of 4 regions" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines if len(line) > 1 and line[1][0] in "+-"] == [
        "a", "[", "bold", "]", "red", "square",
    ]  # fmt: skip
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.size == (448, 448)


def test_it_prints_how_faithful_it_is(words, capsys):
    assert main([*words, "--faithfulness"]) == 0
    rows = capsys.readouterr().out.splitlines()
    for name in ("most relevant regions", "those of untrained models", "random regions"):
        (row,) = (row for row in rows if row.startswith(name))
        assert all(-1 <= float(number) <= 1 for number in row.split()[-2:])


def test_it_overwrites_nothing(words, tmp_path, capsys):
    out = tmp_path / "overlay.png"
    out.write_bytes(b"mine")
    assert main([*words, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"


def test_a_picture_that_is_not_there_is_one_line(words, capsys):
    assert main([*words[:2], "nowhere.png", "a cat"]) == 2
    assert capsys.readouterr().err == "error: nowhere.png: cannot read: No such file or directory\n"
