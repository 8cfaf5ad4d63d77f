"""What `vlm train` says of data it cannot use: one clear line, the designed exit code, no files."""

import io
import json
import tarfile

import pytest
from PIL import Image

from vlm.cli.main import main


def write_shard(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def train(config, tmp_path, capsys):
    """Run `vlm train` here; its exit code and its error lines."""

    def train(data, *words):
        code = main(["train", str(config), f"data.train={data}", f"run.dir={tmp_path}/run", *words])
        return code, capsys.readouterr().err

    return train


def test_a_pattern_that_matches_nothing(train, tmp_path):
    code, err = train(f"{tmp_path}/*.tar")
    assert (code, err.count("\n")) == (3, 1)
    assert f"{tmp_path}/*.tar" in err
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named(train, tmp_path):
    write_shard(tmp_path / "s-0.tar", [("a.png", png()), ("a.txt", b"red")])
    code, err = train(f"{tmp_path}/s-{{0..1}}.tar")
    assert (code, err.count("\n")) == (3, 1)
    assert "s-1.tar" in err


def test_a_shard_without_pictures_lists_its_fields(train, tmp_path):
    write_shard(tmp_path / "s.tar", [("a.bin", b"x"), ("a.txt", b"red")])
    code, err = train(tmp_path / "s.tar")
    assert code == 3
    assert "no sample has an image field" in err
    assert "bin, txt" in err


def test_a_shard_without_captions_says_so(train, tmp_path):
    write_shard(tmp_path / "s.tar", [("a.png", png()), ("a.json", b"{}")])
    code, err = train(tmp_path / "s.tar")
    assert (code, err.count("\n")) == (3, 1)
    assert "caption" in err


def test_a_table_without_a_usable_column_lists_the_columns(train, tmp_path):
    (tmp_path / "t.csv").write_text("alpha,beta\n1,2\n")
    code, err = train(tmp_path / "t.csv")
    assert code == 3
    assert "alpha, beta" in err


def test_pictures_that_are_none_end_the_run_with_the_quota(train, tmp_path):
    good = [(f"g{i}.png", png()) for i in range(30)]
    bad = [(f"h{i}.png", png()[:-30]) for i in range(30)]
    texts = [(f"{name[:-4]}.txt", f"text {name}".encode()) for name, _ in good + bad]
    members = sorted([*good, *bad, *texts])
    write_shard(tmp_path / "s.tar", members)
    code, err = train(tmp_path / "s.tar", "data.max_bad_fraction=0.1")
    assert code == 4
    assert "samples were bad, more than data.max_bad_fraction=0.1 allows; mend or remove" in err
    assert "image.truncated: s.tar: 'h" in err


def test_a_few_bad_pictures_are_counted_and_masked(train, tmp_path):
    members = [(f"g{i:02}.png", png()) for i in range(40)] + [("h.png", png()[:-30])]
    texts = [(f"{name[:-4]}.txt", f"text {name}".encode()) for name, _ in members]
    write_shard(tmp_path / "s.tar", sorted([*members, *texts]))
    code, err = train(
        tmp_path / "s.tar", "data.max_bad_fraction=0.1", "train.steps=6", "run.log_every_steps=1"
    )
    assert code == 0, err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["bad_samples"] in (2, 3)  # 96 visits to 41 samples


@pytest.mark.parametrize("word", ["train.device=tpu", "train.device=cuda"])
def test_a_device_that_is_not_there(train, tmp_path, word):
    import torch

    if torch.cuda.is_available() and word.endswith("cuda"):
        pytest.skip("there is one")
    code, err = train("unused", word)
    assert (code, err.count("\n")) == (2, 1)


def test_the_plan_tells_of_samples_without_a_caption(config, tmp_path, capsys):
    members = [("a.png", png()), ("a.txt", b"a"), ("b.png", png()), ("c.png", png())]
    write_shard(tmp_path / "a.tar", members)
    words = (f"data.train={tmp_path}/a.tar", f"run.dir={tmp_path}/run")
    assert main(["train", str(config), *words, "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("without a caption")]
    assert " 2 samples: masked in training" in line
    assert not (tmp_path / "run").exists()
