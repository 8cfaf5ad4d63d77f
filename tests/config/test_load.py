"""What a user reads when settings are wrong, and what a right file means."""

import math
from pathlib import Path

import pytest

from vlm.config.load import load_config
from vlm.config.rules import check
from vlm.config.schema import (
    CaptionerConfig,
    Config,
    DataConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
)

SECTIONS = "data, model, loss, optim, train, eval, run"


def test_every_mistake_is_reported_at_once_in_the_order_of_the_file(problems):
    text = """\
data:
  train: shards
optim:
  lr: -1
  weigth_decay: 0.1
  zzz: 1
train:
  steps: many
  precision: fp16
loss: {caption_weight: 2.0}
"""
    assert problems(text, ["optim.lr=abc", "foo", "run.log_every_steps=0"]) == [
        "emoji.yaml:5: unknown key optim.weigth_decay; did you mean optim.weight_decay?",
        "emoji.yaml:6: unknown key optim.zzz; optim has name, lr, lr_scale, weight_decay, beta1, "
        "beta2, eps, warmup_steps, schedule, decay_fraction, min_lr_fraction, clip_grad_norm, "
        "trainable_groups",
        'emoji.yaml:8: train.steps must be a whole number, is "many"',
        'emoji.yaml:9: train.precision must be one of auto, fp32, tf32, bf16; is "fp16"',
        "emoji.yaml:10: loss.caption_weight (2) does nothing without a model.captioner; add "
        "model.captioner: {}, or remove it",
        'override optim.lr=abc: optim.lr must be a number, is "abc"',
        "override foo: write it as section.key=value, such as optim.lr=1e-3",
        "override run.log_every_steps=0: run.log_every_steps must be at least 1, is 0",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optim: {lr: 0}", "optim.lr must be greater than 0, is 0"),
        ("optim: {beta1: 1}", "optim.beta1 must be less than 1, is 1"),
        ("data: {val_fraction: -0.5}", "data.val_fraction must be at least 0, is -0.5"),
        ("data: {max_bad_fraction: 2}", "data.max_bad_fraction must be at most 1, is 2"),
        ("optim: {lr: 1e999}", "optim.lr must be a finite number, is Infinity"),
        ("optim: {lr: .nan}", 'optim.lr must be a number, is ".nan"'),
        ("optim: {lr: true}", "optim.lr must be a number, is true"),
        ("optim: {lr: off}", 'optim.lr must be a number, is "off"'),
        ("optim: {lr: [1]}", "optim.lr must be a number, is [1]"),
        ("optim: {lr: {a: 1}}", 'optim.lr must be a number, is {"a": 1}'),
        ("optim: {lr: 1:30}", 'optim.lr must be a number, is "1:30"'),
        ("optim: {lr: }", "optim.lr must be a number, is null"),
        ("train: {steps: 1.5}", "train.steps must be a whole number, is 1.5"),
        ("train: {steps: 1e3}", "train.steps must be a whole number, is 1000.0; write 1000"),
        ("train: {steps: None}", 'train.steps must be a whole number, is "None"; write null'),
        ("run: {dir: 5}", 'run.dir must be text, is 5; as text it is written "5"'),
        ("run: {dir: null}", "run.dir must be text, is null"),
        ("optim:", "optim must be a section, is null; write {} for its defaults"),
        ("optim: 5", "optim must be a section, is 5"),
        ("model: {captioner: 5}", "model.captioner must be a section, is 5"),
        ("model: {image: {kwargs: 5}}", "model.image.kwargs must be a section, is 5"),
        (
            "model: {image: {kwargs: {a: [1]}}}",
            "model.image.kwargs.a must be text, a number, true or false; is [1]",
        ),
        (
            "model: {image: {kwargs: {qk_norm: off}}}",
            'model.image.kwargs.qk_norm is the text "off"; write true or false',
        ),
        ("model: {image: {mean: 5}}", "model.image.mean must be a list, is 5"),
        ("model: {image: {mean: [1]}}", "model.image.mean must be a list of 3, is [1]"),
        (
            "model: {image: {mean: [1, 2, 3, 4]}}",
            "model.image.mean must be a list of 3, is [1, 2, 3, 4]",
        ),
        ("model: {image: {mean: [1, x, 3]}}", 'model.image.mean.1 must be a number, is "x"'),
        (
            "model: {image: {stem_channels: [1, 0]}}",
            "model.image.stem_channels.1 must be at least 1, is 0",
        ),
        ("- optim", f'must hold sections: {SECTIONS}; is ["optim"]'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_rule(problems, text, problem):
    assert problems("\n" + text) == [f"emoji.yaml:2: {problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "optim: {batch_size: 1}",
            "optim.batch_size; did you mean train.global_batch_size or train.micro_batch_size?",
        ),
        ("model: {width: 1}",
         "model.width; did you mean model.text.width or model.captioner.width?"),
        ("optimm: {lr: 1}", "optimm; did you mean optim?"),
        ("nope: 1", f"nope; a config has {SECTIONS}"),
        ("optim.lr: 1", "optim.lr; write lr under optim:"),
        ("model.text.width: 8", "model.text.width; write width under model: text:"),
        ("<<: {optim: {lr: 1}}", f"<<; a config has {SECTIONS}"),
        (r'"\e[31m": 1', rf"\x1b[31m; a config has {SECTIONS}"),
        ('"": 1', f'""; a config has {SECTIONS}'),
        ("_target_: os.system", f"_target_; a config has {SECTIONS}"),
    ],
)  # fmt: skip
def test_an_unknown_key_comes_with_the_nearest_right_one(problems, text, problem):
    assert problems(text) == [f"emoji.yaml:1: unknown key {problem}"]


def test_a_misspelt_key_is_not_reported_as_missing_too(problems):
    assert problems("data: {train: x}\ntrain: {step: 5}") == [
        "emoji.yaml:2: unknown key train.step; did you mean train.steps?"
    ]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("data: {train: x}", 1,
         "train.steps or train.epochs must say how long to train on data.train"),
        ("train:\n  epochs: 2\n  steps: 5", 3,
         "steps or epochs, not both: train.steps is 5 and train.epochs is 2; set one to null, "
         "as train.epochs=null"),
        ("data: {streams: 16}\ntrain: {global_batch_size: 1000}", 2,
         "train.global_batch_size (1000) must be divisible by data.streams (16); use 992 or 1008"),
        ("data:\n  streams: 1500", 2,
         "train.global_batch_size (1024) must be divisible by data.streams (1500); use 1500"),
        ("model: {text: {width: 100}}", 1,
         "model.text.width (100) must be divisible by model.text.num_heads (8); use 96 or 104"),
        ("model: {captioner: {num_heads: 7}}", 1,
         "model.captioner.width (512) must be divisible by model.captioner.num_heads (7); "
         "use 511 or 518"),
        ("loss:\n  caption_weight: 2", 2,
         "loss.caption_weight (2) does nothing without a model.captioner; "
         "add model.captioner: {}, or remove it"),
        ("eval: {every_steps: 5}", 1,
         "eval.every_steps does nothing without eval.suite, a YAML file of tasks"),
        ("run: {keep_best: 'max:eval/zero_shot-val/acc1'}", 1,
         "run.keep_best: eval/zero_shot-val/acc1 is measured by eval.every_steps alone; "
         "set it, too"),
        ("run: {wandb_project: birds}", 1,
         "run.wandb_project does nothing without run.trackers: [wandb]"),
        ("run: {trackers: [wandb, mlflow]}", 1,
         'run.trackers.1 must be one of tensorboard, wandb; is "mlflow"'),
        ("model: {max_logit_scale: 5}", 1,
         "model.init_logit_scale (14.2857) must be at most model.max_logit_scale (5)"),
    ],
)  # fmt: skip
def test_a_rule_between_settings_is_reported_where_one_was_given(problems, text, line, problem):
    assert problems(text) == [f"emoji.yaml:{line}: {problem}"]


def test_check_takes_a_config_made_in_python():
    config = Config(
        data=DataConfig(train="x", streams=3),
        model=ModelConfig(text=TextConfig(width=100), captioner=CaptionerConfig(width=100)),
        train=TrainConfig(global_batch_size=8),
    )
    assert [problem.keys[0] for problem in check(config)] == [
        "train.steps",
        "train.global_batch_size",
        "model.text.width",
        "model.captioner.width",
    ]
    assert check(Config()) == []


def test_numbers_read_as_people_write_them(load):
    config = load("optim: {lr: 1e-3, eps: .5, weight_decay: 1}\ntrain: {steps: 5_000, epochs: }")
    assert (config.optim.lr, config.optim.eps, config.train.steps) == (1e-3, 0.5, 5000)
    assert type(config.optim.weight_decay) is float
    assert load("run: {save_every_minutes: 5e4}").run.save_every_minutes == 50_000.0
    assert load("train: {steps: 010}").train.steps == 10  # no octal


def test_words_stay_text_unless_they_are_true_false_or_null(load):
    words = ["off", "yes", "12:30", "2024-01-01", "0x10", "=", "."]
    assert [load(f"run: {{dir: {word}}}").run.dir for word in words] == words
    kwargs = load("model: {image: {kwargs: {a: true, b: False, c: 1, d: 1.0, e: x, 7: '1'}}}")
    assert repr(kwargs.model.image.kwargs) == (
        "{'a': True, 'b': False, 'c': 1, 'd': 1.0, 'e': 'x', '7': '1'}"
    )


def test_an_empty_file_means_the_defaults(load):
    assert load("") == load("# nothing\n") == Config()


def test_lists_become_tuples_and_empty_sections_their_defaults(load):
    config = load("model: {image: {stem_channels: [8, 16]}, captioner: {}}\noptim: {}")
    assert config.model.image.stem_channels == (8, 16)
    assert config.model.captioner == CaptionerConfig()


def test_overrides_win_over_the_file_and_later_ones_over_earlier(load):
    config = load("optim: {lr: 1, eps: 1}", ["optim.lr=2", "optim.lr = 3e-1", "run.dir=a=b"])
    assert (config.optim.lr, config.optim.eps, config.run.dir) == (0.3, 1.0, "a=b")


def test_overrides_make_drop_and_merge_sections(load):
    text = "model: {captioner: {depth: 2}}"
    assert load("", ["model.captioner.width=128"]).model.captioner == CaptionerConfig(width=128)
    assert load(text, ["model.captioner=null"]).model.captioner is None
    merged = load(text, ["model.captioner={width: 64, num_heads: 4}"]).model.captioner
    assert merged == CaptionerConfig(width=64, depth=2, num_heads=4)


def test_overrides_set_or_replace_the_entries_of_a_dict(load):
    text = "model: {image: {kwargs: {depth: 2}}}"
    added = load(text, ["model.image.kwargs.embed_dim=64"]).model.image.kwargs
    assert added == {"depth": 2, "embed_dim": 64}
    assert load(text, ["model.image.kwargs={heads: 3}"]).model.image.kwargs == {"heads": 3}
    assert load(text, ["model.image.kwargs={}"]).model.image.kwargs == {}


def test_one_text_is_one_override(load):
    assert load("", "train.seed=3").train.seed == 3


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("foo", "write it as section.key=value, such as optim.lr=1e-3"),
        ("=5", "write it as section.key=value, such as optim.lr=1e-3"),
        ("optim.weigth_decay=1",
         "unknown key optim.weigth_decay; did you mean optim.weight_decay?"),
        ("optim.batch_size=1",
         "unknown key optim.batch_size; did you mean train.global_batch_size or "
         "train.micro_batch_size?"),
        ("optim.lr=-1", "optim.lr must be greater than 0, is -1"),
        ("optim.lr=", "optim.lr must be a number, is null"),
        ("optim.lr.x=1", 'optim.lr must be a number, is {"x": 1}'),
        ("optim=5", "optim must be a section, is 5"),
        ("data.train=*.tar",
         "anchors (&) and aliases (*) are not allowed; write the value out, or quote it"),
        ("optim={lr: 1, lr: 2}", "duplicate key lr; it is on line 1 already"),
        ("run.dir=[a", "not YAML: while parsing a flow sequence, expected ',' or ']', but got "
                       "'<stream end>'; text with special characters needs quotes"),
        ("run.dir=!!python/name:os.system", "the tag !!python/name:os.system is not allowed; "
                                            "give plain text, numbers, lists and sections"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_quoted_in_its_message(problems, override, problem):
    assert problems("", [override]) == [f"override {override}: {problem}"]


def test_control_codes_and_long_values_are_made_safe_to_print(problems):
    assert problems(r'run: {dir: ["\e[31m", "\u202e"]}') == [
        r'emoji.yaml:1: run.dir must be text, is ["\u001b[31m", "\u202e"]'
    ]
    (line,) = problems("", [f"train.steps={'x' * 1000}"])
    assert line == (
        f'override train.steps={"x" * 65}...: train.steps must be a whole number, is "{"x" * 76}...'
    )
    assert problems("", ["run.dir=\x1b[31m"]) == [
        r"override run.dir=\x1b[31m: not YAML: the character U+001B"
    ]


def test_overrides_from_python_carry_values(load):
    values = {
        "optim.lr": 1e-3,
        "model.image.stem_channels": (8, 16),
        "model.captioner": CaptionerConfig(width=64),
        "run.dir": Path("runs/x"),
        "train": {"steps": 5, "precision": "fp32"},
        "data.train": "off",
    }
    config = load("train: {seed: 3}", values)
    assert config.optim.lr == 1e-3
    assert config.model.image.stem_channels == (8, 16)
    assert config.model.captioner == CaptionerConfig(width=64)
    assert config.run.dir == "runs/x"
    assert config.train == TrainConfig(steps=5, precision="fp32", seed=3)
    assert config.data.train == "off"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (-1, "=-1: optim.lr must be greater than 0, is -1"),
        ("1e-3", '="1e-3": optim.lr must be a number, is "1e-3"'),
        (math.nan, "=NaN: optim.lr must be a finite number, is NaN"),
        (1j, '="1j": a setting can\'t hold "1j"'),
        ("\ud800", '="\\ud800": a setting can\'t hold "\\ud800"'),
    ],
)  # fmt: skip
def test_a_wrong_value_from_python_is_reported_alike(problems, value, problem):
    assert problems("", {"optim.lr": value}) == [f"override optim.lr{problem}"]


def test_a_shipped_name_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/mine.yaml").write_text("train: {seed: 7}")
    assert load_config("mine").train.seed == 7
