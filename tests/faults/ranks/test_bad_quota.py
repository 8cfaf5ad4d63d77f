"""C5: bad samples up to a share are counted, more of them end the run, with a table of where."""

import io
import json
import tarfile
import time

import pytest
from PIL import Image

from vlm.checkpoint import load_newest
from vlm.report.page import write_report

NUM_SAMPLES = 200
OTHERS = [
    pytest.param(*numbers, marks=pytest.mark.long) for numbers in ((0, 2), (1, 1), (4, 2), (200, 1))
]


def write_shard(path, num_bad, num_kept_bytes=None):
    """Bad ones, cut in their middle or to some bytes, among good ones; and where they begin."""
    bad = {round((n + 0.5) * NUM_SAMPLES / num_bad) for n in range(num_bad)}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in range(NUM_SAMPLES):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (key % 256, key // 256, 9)).save(picture, "PNG")
            data = picture.getvalue()
            if key in bad:
                data = data[: len(data) // 2 if num_kept_bytes is None else num_kept_bytes]
            for suffix, content in (("png", data), ("txt", f"picture {key}".encode())):
                info = tarfile.TarInfo(f"{key:04}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        return {
            m.name[:4]: m.offset_data
            for m in tar
            if m.name.endswith("png") and int(m.name[:4]) in bad
        }


@pytest.mark.parametrize(("num_bad", "world_size"), [(0, 1), (1, 2), (4, 1), (200, 2), *OTHERS])
def test_one_per_cent_is_the_limit(start, run, metrics, record, tmp_path, num_bad, world_size):
    offsets = write_shard(tmp_path / "s.tar", num_bad)
    data = (f"data.train={tmp_path}/s.tar", "data.max_bad_fraction=0.01")
    ranks = start(*data, "train.steps=25", "run.save_every_steps=0", world_size=world_size)
    began = time.monotonic()
    codes = ranks.wait()
    took_s = time.monotonic() - began
    assert codes == [4 if num_bad > 2 else 0] * world_size, ranks.said(0)[-5:]
    if num_bad > 2:
        assert len(ranks.errors()) == 1
        assert "data.max_bad_fraction=0.01 allows" in next(iter(ranks.errors().values()))
        table = [line for rank in range(world_size) for line in ranks.said(rank)]
        assert any("image." in line and ": s.tar: '" in line for line in table)
    if num_bad == 200:
        assert metrics() == []  # the first step was the last
    if num_bad:
        rows = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
        assert {row["reason"].split(".")[0] for row in rows} == {"image"}
        for row in rows:
            assert 1 <= len(row["examples"]) <= 3
            for example in row["examples"]:
                assert example["shard"] == "s.tar"
                assert example["offset"] == offsets[example["key"]]
    if num_bad == 1:
        assert sum(row["count"] for row in rows) == 2  # in two epochs
        assert metrics()[-1]["bad_by_reason"] == {row["reason"]: row["count"] for row in rows}
        assert load_newest(run / "checkpoints").state["guards"]["bad"]["counts"] == {
            row["reason"]: row["count"] for row in rows
        }
        page = write_report(run).read_text()
        assert all(example["key"] in page for row in rows for example in row["examples"])
    record(
        "C5", f"{num_bad / 2:g}% bad, {world_size} rank(s)", 1, f"exit {codes[0]}, {took_s:.1f} s"
    )


@pytest.mark.parametrize(("num_bad", "code"), [(1, 0), (4, 4)])
def test_what_the_index_leaves_out_counts_too(start, run, record, tmp_path, num_bad, code):
    write_shard(tmp_path / "s.tar", num_bad, num_kept_bytes=0)
    data = (f"data.train={tmp_path}/s.tar", "data.max_bad_fraction=0.01")
    ranks = start(*data, "train.steps=2", "run.save_every_steps=0", world_size=1)
    assert ranks.wait() == [code], ranks.said(0)[-5:]
    if code:
        said = ranks.said(0)
        assert "4 of 200 samples were left out" in ranks.errors()[0]
        assert any("4 image.empty: s.tar at byte " in line for line in said)
        assert not run.exists() or not list(run.glob("*.jsonl"))
    record("C5", f"{num_bad / 2:g}% left out by the index", 1, f"exit {code}")
