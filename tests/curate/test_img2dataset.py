"""A folder that img2dataset wrote is read as it is."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm.config.schema import FilterConfig
from vlm.curate.select import choose
from vlm.curate.source import open_data


def meta(key, number, status="success"):
    return {
        "caption": f"caption {number}",
        "url": f"https://example.org/{number}.jpg",
        "key": key,
        "status": status,
        "error_message": None if status == "success" else "HTTP Error 404: Not Found",
        "width": 24 if status == "success" else None,
        "height": 16 if status == "success" else None,
        "similarity": 0.2 + number / 100,
        "sha256": f"{number:064x}",
        "exif": "{}",
    }


@pytest.fixture
def folder(tmp_path, make_tar, encoded):
    """Two shards of five; the third download of each failed, and left only its texts."""
    for shard in range(2):
        rows, members = [], []
        for number in range(5):
            key = f"{shard:05}{number:04}"
            row = meta(key, number, "failed_to_download" if number == 2 else "success")
            rows.append(row)
            if number != 2:
                members.append((f"{key}.jpg", encoded(10 * shard + number, "JPEG", (24, 16))))
            members.append((f"{key}.json", json.dumps(row, indent=4).encode()))
            members.append((f"{key}.txt", row["caption"].encode()))
        make_tar(members, f"{shard:05}.tar")
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{shard:05}.parquet")
        (tmp_path / f"{shard:05}_stats.json").write_text('{"count": 5, "successes": 4}')
    return tmp_path


def test_its_shards_are_read_and_failed_downloads_counted(folder):
    dataset = open_data(str(folder), require_captions=True, log=lambda line: None)
    assert len(dataset) == 8
    assert dataset.rejects == {"sample.no_image": 2}
    first = dataset.read(0)
    assert (first.key, first.captions) == ("000000000", ("caption 0",))
    assert first.meta["url"] == "https://example.org/0.jpg"
    assert first.meta["sha256"] == "0" * 64
    assert dataset.image_sizes().tolist() == [[24, 16]] * 8


def test_its_scores_choose(folder):
    dataset = open_data(str(folder), fields=("similarity", "width"), log=lambda line: None)
    assert np.allclose(dataset.field("similarity"), [0.2, 0.21, 0.23, 0.24] * 2)
    rules = FilterConfig(fields={"similarity": ">= 0.23", "width": "> 20"})
    kept, ledger = choose(dataset, rules, name="web")
    assert [kept.read(i).captions[0] for i in range(len(kept))] == ["caption 3", "caption 4"] * 2
    assert ledger.num_all == 10
