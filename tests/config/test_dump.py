"""A resolved config.yaml reruns the run: it says everything and reads back the same."""

import dataclasses
import json
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.config.load import dump_config, load_config
from vlm.config.schema import (
    CaptionerConfig,
    Config,
    DataConfig,
    ImageConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
ambiguous = (
    st.sampled_from(
        [
            "1e-3",
            "1_0",
            "010",
            "08",
            "0x1F",
            "1:30",
            "2024-01-01",
            ".5",
            "5.",
            "true",
            "Null",
            "~",
            "",
        ]
    )
    | st.sampled_from(
        ["=", "<<", "- a", "*", "!x", "@", "%", "#", "{}", "'x", '"y', "a: b", "a #b", "?", "..."]
    )
    | st.sampled_from(["---", " ", "\ufeff", "\x85", "a\u2028", "x\n", "\n x", "\t", "\x7f"])
)
texts = st.text() | ambiguous
truth_like = {"yes", "no", "on", "off", "None"}

configs = st.builds(
    Config,
    data=st.builds(DataConfig, train=texts, caption_column=st.none() | texts),
    model=st.builds(
        ModelConfig,
        image=st.builds(
            ImageConfig,
            stem_channels=st.lists(st.integers(1, 10**6)).map(tuple),
            mean=st.tuples(finite, finite, finite),
            kwargs=st.dictionaries(
                texts,
                st.booleans()
                | st.integers()
                | finite
                | texts.filter(lambda text: text not in truth_like),
                max_size=3,
            ),
        ),
        captioner=st.none() | st.builds(CaptionerConfig, width=st.integers(1, 99).map((8).__mul__)),
    ),
    optim=st.builds(OptimConfig, lr=positive, eps=positive),
    train=st.builds(TrainConfig, steps=st.integers(1))
    | st.builds(TrainConfig, epochs=positive, seed=st.integers(0)),
    run=st.builds(RunConfig, dir=texts),
)


def as_lists(config: Config) -> object:
    return json.loads(json.dumps(dataclasses.asdict(config)))


@settings(max_examples=40, deadline=None)
@given(config=configs)
def test_a_dumped_config_loads_back_equal(config, tmp_path_factory):
    file: Path = tmp_path_factory.mktemp("dump") / "config.yaml"
    text = dump_config(config)
    file.write_text(text, encoding="utf-8")
    assert repr(load_config(file)) == repr(config)  # repr: 1, 1.0 and True are equal
    assert yaml.load(text, yaml.CSafeLoader) == as_lists(config)  # other tools read the same


def test_the_defaults_are_written_out():
    assert yaml.safe_load(dump_config(Config())) == as_lists(Config())


def test_a_value_used_twice_is_written_twice():
    same = (0.5, 0.5, 0.5)
    text = dump_config(Config(model=ModelConfig(image=ImageConfig(mean=same, std=same))))
    assert text.count("[0.5, 0.5, 0.5]") == 2
    assert "&" not in text
