"""Shards of texts without pictures: read, indexed, joined, and mixed with pairs in training."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from vlm.cli.main import main
from vlm.data.dataset import Dataset, open_shards
from vlm.data.loader import training_batches
from vlm.data.mixture import MixedOrder
from vlm.data.transforms import TrainTransform
from vlm.errors import DataError
from vlm.tokenizer import train_bpe

TEXTS = [(f"t{i}", {"txt": f"alone {i}".encode()}) for i in range(4)]


def opened(*paths: Path, **options: Any) -> Dataset:
    return open_shards(
        [str(path) for path in paths], needs_images=False, log=lambda _: None, **options
    )


def test_a_text_is_read_without_a_picture(make_shard: Any) -> None:
    path = make_shard(TEXTS)
    with pytest.raises(DataError, match=r"train-0000.tar: no sample has an image field .*: txt"):
        open_shards(str(path))
    for _ in range(2):  # the second time from its index
        dataset = opened(path, require_captions=True)
        assert dataset.has_texts_alone
        assert dataset.rejects == {}
        assert [dataset.read(i).captions for i in range(4)] == [(f"alone {i}",) for i in range(4)]
        assert dataset.read(0).image == b""
        assert dataset.image_sizes().tolist() == [[0, 0]] * 4
        assert len(set(dataset.image_hashes().tolist())) == 4
        assert dataset.place(1)[0] == "train-0000.tar"
        assert dataset.place(1)[2] > 0


def test_a_picture_of_an_unknown_format_does_not_make_it_a_text(make_shard: Any) -> None:
    path = make_shard([("a", {"txt": b"x", "tiff": b"x"})])
    with pytest.raises(DataError, match=r"no sample has an image field .*: tiff, txt"):
        opened(path)


def test_a_sample_that_lost_its_picture_is_no_text(make_shard: Any) -> None:
    path = make_shard([*TEXTS[:1], ("p", {"png": b"", "txt": b"x"})])
    with pytest.raises(DataError, match=r"every sample was rejected: 1 sample\.no_image"):
        opened(path)


def test_a_joined_index_knows_which_shards_are_texts(make_shard: Any, tmp_path: Path) -> None:
    pairs, texts = make_shard(3), make_shard(TEXTS, name="texts.tar")
    out = tmp_path / "joined"
    assert pairs.parent == texts.parent
    assert main(["data", "index", str(pairs.parent / "*.tar"), "--out", str(out)]) == 0
    joined = str(out / "shards.json")
    dataset = open_shards(joined, needs_images=False, log=lambda _: None)
    assert {shard.name: shard.texts_alone for shard in dataset.shards} == {
        "train-0000.tar": False,
        "texts.tar": True,
    }
    with pytest.raises(DataError, match=r"texts.tar: no sample has an image field"):
        open_shards(joined, log=lambda _: None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_tells_texts_from_pairs(make_shard: Any, num_workers: int) -> None:
    dataset = opened(make_shard(4), make_shard(TEXTS, name="zz.tar"))
    tokenizer = train_bpe(dataset.captions(), vocab_size=300, context_length=12)
    batches = training_batches(
        dataset,
        MixedOrder([[4], [4]], [1, 1], seed=0, streams=1, global_batch_size=4),
        transform=TrainTransform(8),
        tokenizer=tokenizer,
        seed=0,
        micro_batch_size=4,
        num_workers=num_workers,
        cache_bytes=10**6,
    )
    for batch in islice(batches, 4):
        assert batch.texts_alone is not None
        assert batch.texts_alone.equal(batch.sample_ids >= 4)
        assert batch.valid.equal(~batch.texts_alone)
        assert not batch.bad.total
        for row, sample in enumerate(batch.sample_ids.tolist()):
            assert tokenizer.decode(batch.tokens[row]).strip() == (
                f"alone {sample - 4}" if sample >= 4 else f"caption {sample}"
            )
            assert bool(batch.images[row].any()) == (sample < 4)
    batches.close()


def test_the_bytes_of_an_index_do_not_depend_on_the_process(make_shard: Any) -> None:
    path = make_shard([("a", {"json": b'{"n": 1}', "txt": b"words", "cls": b"3"})])
    script = "import sys; from pathlib import Path; from vlm.data.shards import build_index; "
    script += "sys.stdout.buffer.write(build_index(Path(sys.argv[1])))"
    found = {
        subprocess.run(
            [sys.executable, "-c", script, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_check_does_not_decode_what_is_no_picture(make_shard: Any, capsys: Any) -> None:
    path = make_shard(TEXTS)
    assert main(["data", "index", str(path)]) == 0
    assert main(["data", "check", str(path), "--decode"]) == 0, capsys.readouterr()


def test_a_tokenizer_is_trained_on_texts_alone(make_shard: Any, tmp_path: Path) -> None:
    words = ["data", "tokenizer", str(make_shard(TEXTS)), "--out", str(tmp_path / "t.json")]
    assert main([*words, "--vocab-size", "300"]) == 0
