"""A run on remote sources: its settings reach the cache, and it reads what a local run does."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from vlm.config.load import load_config
from vlm.data.shards import open_index
from vlm.errors import ConfigError
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts

EMOJI = Path(__file__).parents[2] / "datasets/emoji"


@pytest.fixture
def parts(config, web, tmp_path):
    """The parts of a run on a mixture, its shards named by a function."""
    for name in ("val_artist-0000.tar", "val_concept-0000.tar"):
        open_index(Path(shutil.copy(EMOJI / name, web.folder)))

    def parts(place, **settings):
        sources = [
            {"data": place("val_artist-0000.tar"), "name": "artist", "weight": 2.0},
            {
                "data": place("val_concept-0000.tar"),
                "name": "concept",
                "weight": 1.0,
                "filter": {"max_caption_chars": 12},
            },
        ]
        changes = {"data.train": sources, "data.cache_dir": str(tmp_path / "cache"), **settings}
        return build_parts(load_config(config, changes), Ranks())

    return parts


def test_a_remote_mixture_trains_as_the_local_one(parts, web, tmp_path):
    local, remote = parts(lambda name: str(web.folder / name)), parts(web.url)
    assert remote.data.state == local.data.state
    batches = [made.batches(5, Ranks()) for made in (local, remote)]
    for _ in range(3):
        ours, theirs = map(next, batches)
        assert np.array_equal(ours.sample_ids, theirs.sample_ids)
        assert np.array_equal(ours.images, theirs.images)
    for batch in batches:
        batch.close()
    assert web.count(".tar") == 2
    assert len(list((tmp_path / "cache/remote").glob("*.tar"))) == 2


def test_a_cache_too_small_for_a_step_of_a_mixture_is_refused(parts, web):
    remote = parts(web.url, **{"data.shard_cache_gib": 0.002})
    with pytest.raises(ConfigError, match=r"shard_cache_gib \(0.002\) is less than the"):
        next(remote.batches(0, Ranks()))
