"""D4: shards of any number and size on any number of ranks and workers: positions are split."""

import pytest


@pytest.mark.parametrize(
    ("sizes", "workers"),
    [
        pytest.param([40], 4, id="one shard, 4 workers a rank", marks=pytest.mark.long),
        pytest.param([1, 70, 3], 1, id="more ranks than fit", marks=pytest.mark.long),
        pytest.param([5], 0, id="less than a batch", marks=pytest.mark.long),
        pytest.param([1], 2, id="one sample", marks=pytest.mark.long),
        pytest.param([33, 1, 1, 90], 0, id="uneven"),
        pytest.param([17] * 3, 0, id="three shards", marks=pytest.mark.long),
    ],
)
def test_two_ranks_take_equal_steps(start, metrics, record, write_shard, tmp_path, sizes, workers):
    for number, size in enumerate(sizes):
        write_shard(tmp_path / f"s-{number}.tar", size)
    data = (f"data.train={tmp_path}/s-*.tar", f"data.num_workers={workers}")
    ranks = start(*data, "train.steps=8", "train.global_batch_size=16")
    assert ranks.wait() == [0, 0], ranks.said(0)[-3:]
    lines = metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["bad_samples"] == 0
    record("D4", f"shards of {sizes}, {workers} workers, 2 ranks", 1, "8 steps on both, exit 0")
