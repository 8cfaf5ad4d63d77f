"""Choosing samples: every drop has its reason, and kept + dropped + rejected is all there was."""

import json
from collections import Counter

import numpy as np
import pytest

from vlm.config.schema import FilterConfig
from vlm.curate.select import choose
from vlm.curate.source import open_data
from vlm.data.dataset import open_shards
from vlm.errors import ConfigError, DataError


@pytest.fixture
def dataset(make_tar, encoded):
    """Ten samples: one without a picture, and one for each rule."""

    def sample(key, number, size=(40, 40), caption="a picture", **meta):
        meta = json.dumps({"caption": caption, **meta}).encode()
        return [(f"{key}.png", encoded(number, size=size)), (f"{key}.json", meta)]

    members = [
        *sample("good", 0, similarity=0.5),
        *sample("small", 1, size=(8, 40), similarity=0.5),
        *sample("long", 2, size=(30, 100), similarity=0.5),
        *sample("silent", 3, caption="x", similarity=0.5),
        *sample("chatty", 4, caption="word " * 100, similarity=0.5),
        *sample("unlike", 5, similarity=0.1),
        *sample("unmeasured", 6),
        *sample("again", 0, similarity=0.9),
        *sample("denied", 7, similarity=0.9),
        ("no_picture.json", b"{}"),
    ]
    return open_shards(str(make_tar(members)), fields=("similarity",), log=lambda line: None)


def chosen(dataset, **rules):
    kept, ledger = choose(dataset, FilterConfig(**rules), name="a", log=pytest.fail)
    return [kept.key(i) for i in range(len(kept))], ledger


RULES = {
    "min_image_side": 20,
    "max_aspect": 3.0,
    "min_caption_chars": 3,
    "max_caption_chars": 300,
    "fields": {"similarity": ">= 0.28"},
    "dedup": "exact",
}


def test_every_sample_is_kept_or_has_its_reason(dataset, tmp_path):
    (tmp_path / "deny").write_text("a.tar/denied\n")
    keys, ledger = chosen(dataset, deny_ids=str(tmp_path / "deny"), **RULES)
    assert keys == ["good"]
    assert ledger.dropped.examples == {
        "filter.deny_ids": ["a.tar/denied"],
        "filter.image_side": ["a.tar/small"],
        "filter.aspect": ["a.tar/long"],
        "filter.caption_chars": ["a.tar/silent", "a.tar/chatty"],
        "filter.similarity.missing": ["a.tar/unmeasured"],
        "filter.similarity": ["a.tar/unlike"],
        "dedup.exact": ["a.tar/again (repeats a.tar/good)"],
    }
    assert ledger.rejected.counts == {"sample.no_image": 1}
    assert "a.tar at byte" in ledger.rejected.examples["sample.no_image"][0]
    assert ledger.num_all == 10
    assert list(ledger.lines())[:2] == [
        "a: 1 of 10 samples kept",
        "a: dropped 1 filter.deny_ids: a.tar/denied",
    ]


def test_random_rules_always_account_for_every_sample(dataset, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "ids").write_text("good\nsmall\nlong\nchatty\nagain\ndenied\nsilent\n")
    options = {**RULES, "allow_ids": str(tmp_path / "ids"), "deny_ids": str(tmp_path / "ids")}
    reasons = Counter()
    for _ in range(60):
        rules = {name: value for name, value in options.items() if rng.random() < 0.4}
        fraction = float(rng.choice([0.0, 0.5]))
        try:
            kept, ledger = choose(dataset, FilterConfig(**rules), name="a", val_fraction=fraction)
        except DataError as error:
            assert error.problems[0] == "a: no sample is left"  # noqa: PT017  # sometimes
            continue
        dropped = sum(ledger.dropped.counts.values())
        assert len(kept) + dropped + sum(ledger.rejected.counts.values()) == 10
        assert ledger.as_json()["all"] == 10
        reasons.update(ledger.dropped.counts)
    assert len(reasons) == 9


def test_the_first_of_a_group_that_passes_the_filters_is_kept(dataset):
    keys, _ = chosen(dataset, dedup="exact", fields={"similarity": "> 0.5 and <= 0.9"})
    assert keys == ["again", "denied"]
    keys, _ = chosen(dataset, dedup="perceptual")
    assert "good" in keys
    assert "again" not in keys


def test_ids_are_keys_or_shards_with_keys_and_unknown_ones_are_told(dataset, tmp_path):
    path = tmp_path / "ids"
    path.write_text("good\n\na.tar/long \nb.tar/small\n")
    told = []
    kept, _ = choose(dataset, FilterConfig(allow_ids=str(path)), name="a", log=told.append)
    assert [kept.key(i) for i in range(len(kept))] == ["good", "long"]
    assert told == [f"{path}: 1 of 3 ids name no sample: b.tar/small"]


def test_the_selection_is_part_of_the_fingerprint(dataset):
    everything, _ = choose(dataset, FilterConfig(), name="a")
    some, _ = choose(dataset, FilterConfig(min_image_side=20), name="a")
    others, _ = choose(dataset, FilterConfig(max_aspect=3.0), name="a")
    prints = {dataset.fingerprint, everything.fingerprint, some.fingerprint, others.fingerprint}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"\xff\xfe\xff", "cannot be read"), (b"\n", "no ids")],
)
def test_a_list_of_ids_that_is_none_is_a_config_error(dataset, tmp_path, content, problem):
    if content is not None:
        (tmp_path / "ids").write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        choose(dataset, FilterConfig(deny_ids=str(tmp_path / "ids")), name="a")


def test_a_field_that_was_not_indexed_says_how_to_index_it(dataset):
    with pytest.raises(DataError, match='"punsafe" was not indexed'):
        chosen(dataset, fields={"punsafe": "< 0.1"})


def test_what_packing_left_out_is_accounted_for(tmp_path, encoded):
    (tmp_path / "0.png").write_bytes(encoded(0))
    (tmp_path / "1.png").write_bytes(b"no picture")
    rows = "".join(f"{number}.png,caption {number}\n" for number in range(3))
    (tmp_path / "photos.csv").write_text(f"image,caption\n{rows}")
    dataset = open_data(str(tmp_path / "photos.csv"), log=lambda line: None)
    kept, ledger = choose(dataset, FilterConfig(), name="photos")
    assert (len(kept), ledger.num_all) == (1, 3)
    assert ledger.rejected.counts == {"image.format": 1, "image.missing": 1}
