"""A run on several sources: what it tells, what it writes down, and that it resumes to the bit."""

import json
import re
import shutil
from pathlib import Path

import pytest

import vlm
from vlm.checkpoint import list_checkpoints
from vlm.cli.main import main
from vlm.config.load import load_config
from vlm.errors import ConfigError, DataError
from vlm.training.sources import open_training_data

EMOJI = Path(__file__).parents[2] / "datasets/emoji"
ARTIST = {"data": f"{EMOJI}/val_artist-*.tar", "name": "artist", "weight": 2.0}
CONCEPT = {"data": f"{EMOJI}/val_concept-*.tar", "name": "concept", "weight": 1.0}
SMALL = {**CONCEPT, "filter": {"dedup": "exact", "max_caption_chars": 12}}


@pytest.fixture
def short(config, tmp_path):
    """The tiny config with a mixture and ten steps."""

    def short(sources, **settings):
        changes = {"data.train": sources, "train.steps": 10, "run.dir": str(tmp_path / "run")}
        return load_config(config, {**changes, **settings})

    return short


@pytest.mark.long
def test_a_mixture_resumes_to_the_same_bits_and_counts_its_passes(start, metrics, tmp_path):
    words = (f"data.train={json.dumps([ARTIST, SMALL])}", "train.steps=12")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert "concept: dropped" in start(*words, f"run.dir={whole}").finish()
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(list_checkpoints(resumed / "checkpoints")[-1])
    said = start(*words, f"run.dir={resumed}", "--resume", "auto").finish()
    assert "at step 8 of 12" in said
    weights = [(run / "model/model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]
    artist, concept = json.loads((whole / "ledger.json").read_text())["sources"]
    assert (artist["share"], concept["share"]) == (0.666667, 0.333333)
    for run in (whole, resumed):
        last = metrics(run)[-1]
        assert last["passes/artist"] == pytest.approx(128 / artist["kept"], abs=1e-4)
        assert last["passes/concept"] == pytest.approx(64 / concept["kept"], abs=1e-4)


def test_every_sample_of_every_source_is_accounted_for(short, capsys):
    told = []
    data = open_training_data(short([ARTIST, SMALL], **{"data.val_fraction": 0.2}), log=told.append)
    ledger = json.loads(data.ledger())["sources"]
    for source, pattern in zip(ledger, ("val_artist", "val_concept"), strict=True):
        whole = open_training_data(short(f"{EMOJI}/{pattern}-*.tar"), log=told.append)
        dropped = sum(reason["count"] for reason in source["dropped"].values())
        rejected = sum(reason["count"] for reason in source["rejected"].values())
        assert source["kept"] + dropped + rejected == source["all"] == len(whole.dataset)
    assert list(ledger[0]["dropped"]) == ["val_fraction"]
    assert next(iter(ledger[1]["dropped"])) == "filter.caption_chars"
    assert len(data.dataset) == sum(source["kept"] for source in ledger)
    assert f"artist: {ledger[0]['kept']:,} of {ledger[0]['all']:,} samples kept" in told


def test_sample_ids_of_a_mixture_are_of_their_own_source(short):
    data = open_training_data(short([ARTIST, SMALL]), log=lambda line: None)
    alone = [open_training_data(short([one]), log=lambda line: None) for one in (ARTIST, SMALL)]
    names = [one.dataset.name(i) for one in alone for i in range(len(one.dataset))]
    assert [data.dataset.name(i) for i in range(len(data.dataset))] == names
    assert data.dataset.shard_sizes == [n for one in alone for n in one.dataset.shard_sizes]


def test_the_check_tells_drops_and_passes(config, capsys):
    words = [f"data.train={json.dumps([ARTIST, SMALL])}", "train.steps=30"]
    assert main(["train", str(config), *words, "--check"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"concept: dropped [\d,]+ filter.caption_chars: val_concept-0000.tar/", out)
    assert re.search(r"artist: [\d,]+ samples, \d+\.\d passes", out)


def test_without_weights_every_sample_is_seen_equally_often(short):
    sources = [{key: one[key] for key in ("data", "name")} for one in (ARTIST, CONCEPT)]
    data = open_training_data(short(sources), log=lambda line: None)
    passes = data.passes(16 * len(data.dataset))
    assert list(passes.values()) == pytest.approx([16, 16], rel=1e-3)


def test_another_weight_or_filter_is_another_run(short):
    settings = {"train.steps": 4}
    vlm.train(short([ARTIST, SMALL], **settings))
    heavier = [ARTIST, {**SMALL, "weight": 3.0}]
    with pytest.raises(ConfigError, match="samples and weights, source by source, was"):
        vlm.train(short(heavier, **settings), resume="auto")
    looser = [ARTIST, {**SMALL, "filter": {"max_caption_chars": 13}}]
    with pytest.raises(DataError, match="was made with another data set"):
        vlm.train(short(looser, **settings), resume="auto")


def test_a_filter_that_leaves_nothing_says_what_dropped_it(short):
    source = {**CONCEPT, "filter": {"min_image_side": 5000}}
    with pytest.raises(DataError) as raised:
        open_training_data(short([source]), log=lambda line: None)
    assert raised.value.problems[0] == "concept: no sample is left"
    assert "filter.image_side" in raised.value.problems[1]
