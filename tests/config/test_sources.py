"""`data.train` as a list of sources: what it means, and what a wrong one says."""

import pytest

from vlm.config.load import dump_config, load_config
from vlm.config.schema import FilterConfig, SourceConfig

GOOD = """\
train: {steps: 5}
data:
  train:
    - {data: "a/*.tar", name: a, weight: 2}
    - data: b.csv
      weight: 1.5
      caption_column: alt
      filter: {max_aspect: 3, fields: {similarity: ">= 0.28", punsafe: ">0 and < 1e-1"}}
"""


def test_a_list_of_sources_loads_and_comes_back_from_its_dump(load, tmp_path):
    config = load(GOOD)
    first, second = config.data.train
    assert first == SourceConfig("a/*.tar", "a", 2.0)
    assert second.filter == FilterConfig(
        max_aspect=3.0, fields={"similarity": ">= 0.28", "punsafe": ">0 and < 1e-1"}
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_an_override_replaces_the_list_or_the_text(load):
    assert load(GOOD, ["data.train=x.tar"]).data.train == "x.tar"
    sources = load("train: {steps: 5}", ["data.train=[{data: x, weight: 3}]"]).data.train
    assert sources == (SourceConfig("x", weight=3.0),)
    assert load("train: {steps: 5}", {"data.train": sources}).data.train == sources


def test_every_mistake_in_a_source_has_its_line(problems):
    text = """\
train: {steps: 5}
data:
  train:
    - data: a
      wieght: 1
      filter:
        max_aspect: 0.5
        fields: {similarity: about 3}
    - name: b
    - {data: c, data: d, weight: 0}
"""
    assert problems(text) == [
        "emoji.yaml:5: unknown key data.train.0.wieght; did you mean data.train.0.weight?",
        "emoji.yaml:7: data.train.0.filter.max_aspect must be at least 1, is 0.5",
        "emoji.yaml:8: data.train.0.filter.fields.similarity must be a comparison, such as "
        '">= 0.28" or "> 0.2 and < 0.9"; is "about 3"',
        "emoji.yaml:9: data.train.1 lacks data",
        "emoji.yaml:10: duplicate key data.train.2.data; it is on line 10 already",
        "emoji.yaml:10: data.train.2.weight must be greater than 0, is 0",
    ]


@pytest.mark.parametrize(
    ("sources", "line", "problem"),
    [
        ("[]", 3, "data.train is an empty list; give at least one source"),
        ("5", 3, 'data.train must be text, is 5; as text it is written "5"'),
        ("{data: a}", 3, 'data.train must be text, is {"data": "a"}'),
        ("[a]", 3, 'data.train.0 must be a section, is "a"'),
        ("[{data: a},\n  {data: a}]", 4,
         'data.train.1 is called "a" like data.train.0; give it another name'),
        ("[{data: a, weight: 1},\n  {data: b}]", 4,
         "data.train: give a weight to each source, or to none"),
        ("[{data: a, filter: {min_caption_chars: 9, max_caption_chars: 8}}]", 3,
         "data.train.0.filter.min_caption_chars (9) must be at most "
         "data.train.0.filter.max_caption_chars (8)"),
        ("[{data: a, filter: {dedup: exact, dedup_bits: 2}}]", 3,
         "data.train.0.filter.dedup_bits (2) does nothing without dedup: perceptual; add that, or "
         "remove it"),
        ("[{data: a}]\n  caption_column: x", 4,
         "data.caption_column does nothing with a list of sources; write it in the source"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_told_with_its_line(problems, sources, line, problem):
    text = f"train: {{steps: 5}}\ndata:\n  train: {sources}\n"
    assert problems(text) == [f"emoji.yaml:{line}: {problem}"]
