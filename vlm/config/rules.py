"""The rules between settings, which no single setting shows."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from vlm.config.find import printable, shown
from vlm.config.schema import Config, FilterConfig, OptimConfig, RunConfig


class Problem(NamedTuple):
    """A broken rule between settings: the dotted keys it is about, and the line to print."""

    keys: tuple[str, ...]
    text: str


def check(config: Config) -> list[Problem]:
    """The broken rules between settings, which no single setting shows."""
    return list(_broken_rules(config))


def _broken_rules(config: Config) -> Iterator[Problem]:
    yield from _check_sources(config)
    yield from _check_duration(config)
    yield from _check_divisible(config, "train.global_batch_size", "data.streams")
    yield from _check_divisible(config, "model.text.width", "model.text.num_heads")
    yield from _check_text(config)
    if config.model.captioner:
        yield from _check_divisible(config, "model.captioner.width", "model.captioner.num_heads")
        yield from _check_coca(config)
    else:
        yield from _check_unused_caption_settings(config)
    low, high = config.model.init_logit_scale, config.model.max_logit_scale
    if low > high:
        keys = ("model.init_logit_scale", "model.max_logit_scale")
        yield Problem(keys, f"{keys[0]} ({low:g}) must be at most {keys[1]} ({high:g})")
    yield from _check_contrastive(config)
    yield from _check_training(config)
    yield from _check_trackers(config)
    if config.eval.every_steps and config.eval.suite is None:
        keys = ("eval.every_steps", "eval.suite")
        yield Problem(keys, f"{keys[0]} does nothing without {keys[1]}, a YAML file of tasks")
    best = (config.run.keep_best or "").partition(":")[2]
    if best.startswith("eval/") and not config.eval.every_steps:
        keys = ("run.keep_best", "eval.every_steps")
        yield Problem(keys, f"{keys[0]}: {best} is measured by {keys[1]} alone; set it, too")
    for name, value in config.model.image.kwargs.items():
        if value in ("yes", "no", "on", "off", "None"):  # to timm, each of these texts is true
            key = printable(f"model.image.kwargs.{name}")
            yield Problem((key,), f"{key} is the text {shown(value)}; write true or false")


def _check_text(config: Config) -> Iterator[Problem]:
    text, keys = config.model.text, ("model.text.attention", "model.text.pool")
    if text.attention == "bidirectional" and text.pool == "eot":
        yield Problem(keys, f"{keys[1]}=eot is of causal attention; use mean or cls")
    if not text.language_head and config.loss.language_weight != 1.0:
        keys = ("loss.language_weight", "model.text.language_head")
        yield Problem(keys, f"{keys[0]} does nothing without {keys[1]}=true; set it, or remove it")


def _check_coca(config: Config) -> Iterator[Problem]:
    head, keys = config.model.captioner, ("model.captioner.width", "model.text.width")
    width = config.model.text.width
    if head and head.kind == "coca" and head.width != width:
        rule = (
            f"{keys[0]} ({head.width}) must be {keys[1]} ({width}), whose states coca goes on from"
        )
        yield Problem(keys, rule)
    if head and head.kind == "coca" and config.model.text.attention != "causal":
        keys = ("model.captioner.kind", "model.text.attention")
        yield Problem(keys, f"{keys[0]}=coca needs {keys[1]}=causal: captions grow token by token")


def _check_contrastive(config: Config) -> Iterator[Problem]:
    loss, bias = config.loss, config.model.init_logit_bias
    keys = ("loss.contrastive", "model.init_logit_bias")
    if loss.contrastive == "sigmoid" and bias is None:
        yield Problem(keys, f"{keys[0]}=sigmoid needs {keys[1]}; SigLIP's is -10")
    if loss.contrastive == "info_nce" and bias is not None:
        yield Problem(keys, f"{keys[1]} is {bias:g}, and {keys[0]}=info_nce has no bias; use null")
    if config.data.hard_negatives is not None and config.data.augment.shuffle_tags:
        keys = ("data.hard_negatives", "data.augment.shuffle_tags")
        yield Problem(keys, f"{keys[1]} changes the caption alone, which {keys[0]} is told by")
    if config.data.hard_negatives is None and loss.hard_negative_weight != 1:
        keys = ("loss.hard_negative_weight", "data.hard_negatives")
        yield Problem(keys, f"{keys[0]} does nothing without {keys[1]}, a field with texts")
    if loss.contrastive == "sigmoid" and loss.label_smoothing:
        keys = ("loss.contrastive", "loss.label_smoothing")
        yield Problem(keys, f"{keys[1]} is of info_nce; set it to 0 for {keys[0]}=sigmoid")


def _check_training(config: Config) -> Iterator[Problem]:
    if config.train.strategy == "fsdp" and config.optim.name == "muon":
        keys = ("train.strategy", "optim.name")
        text = "train.strategy=fsdp spreads each matrix over the ranks, and optim.name=muon needs"
        yield Problem(keys, f"{text} whole ones; use ddp, or adamw")
    if config.train.memory_budget_gib is not None and config.train.micro_batch_size is not None:
        keys = ("train.memory_budget_gib", "train.micro_batch_size")
        yield Problem(keys, f"{keys[0]} chooses {keys[1]}; set one of them to null")
    for dim in config.loss.matryoshka_dims:
        if dim >= config.model.embed_dim:
            keys = ("loss.matryoshka_dims", "model.embed_dim")
            text = f"{keys[0]} has {dim}, which must be less than {keys[1]}"
            yield Problem(keys, f"{text} ({config.model.embed_dim}): the whole is always learned")
    optim, default = config.optim, OptimConfig()
    if optim.decay_fraction != default.decay_fraction and optim.schedule != "wsd":
        keys = ("optim.decay_fraction", "optim.schedule")
        yield Problem(keys, f"{keys[0]} does nothing without {keys[1]}=wsd")
    if optim.min_lr_fraction != default.min_lr_fraction and optim.schedule == "constant":
        keys = ("optim.min_lr_fraction", "optim.schedule")
        yield Problem(keys, f"{keys[0]} does nothing with {keys[1]}=constant")
    if config.loss.distill is None and config.loss.distill_weight != 1:
        keys = ("loss.distill_weight", "loss.distill")
        yield Problem(keys, f"{keys[0]} does nothing without {keys[1]}, a teacher's folder")


def _check_trackers(config: Config) -> Iterator[Problem]:
    project, default = config.run.wandb_project, RunConfig().wandb_project
    if project != default and "wandb" not in config.run.trackers:
        keys = ("run.wandb_project", "run.trackers")
        yield Problem(keys, f"{keys[0]} does nothing without {keys[1]}: [wandb]")


def _check_duration(config: Config) -> Iterator[Problem]:
    train, keys = config.train, ("train.steps", "train.epochs")
    if train.steps is not None and train.epochs is not None:
        both = f"train.steps is {train.steps} and train.epochs is {train.epochs:g}"
        way_out = "set one to null, as train.epochs=null"
        yield Problem(keys, f"steps or epochs, not both: {both}; {way_out}")
    if config.data.train is not None and train.steps is None and train.epochs is None:
        text = "train.steps or train.epochs must say how long to train on data.train"
        yield Problem((*keys, "data.train"), text)


def _check_divisible(config: Any, key: str, by_key: str) -> Iterator[Problem]:
    value, by = (functools.reduce(getattr, name.split("."), config) for name in (key, by_key))
    low = value // by * by
    if low != value:
        use = f"{low} or {low + by}" if low else f"{by}"
        text = f"{key} ({value}) must be divisible by {by_key} ({by}); use {use}"
        yield Problem((key, by_key), text)


def _check_unused_caption_settings(config: Config) -> Iterator[Problem]:
    for field in dataclasses.fields(config.loss):
        value = getattr(config.loss, field.name)
        if field.name.startswith("caption_") and value != field.default:
            text = f"loss.{field.name} ({value:g}) does nothing without a model.captioner"
            way_out = "add model.captioner: {}, or remove it"
            yield Problem((f"loss.{field.name}", "model.captioner"), f"{text}; {way_out}")

    if config.data.questions is not None:
        text = "data.questions does nothing without a model.captioner"
        yield Problem(("data.questions", "model.captioner"), f"{text}; add model.captioner: {{}}")


def _check_sources(config: Config) -> Iterator[Problem]:
    sources, key = config.data.train, "data.train"
    if not isinstance(sources, tuple):
        return
    if not sources:
        yield Problem((key,), f"{key} is an empty list; give at least one source")
    for column in ("image_column", "caption_column"):
        if getattr(config.data, column) is not None:
            text = f"data.{column} does nothing with a list of sources; write it in the source"
            yield Problem((f"data.{column}", key), text)
    first: dict[str, int] = {}
    for number, source in enumerate(sources):
        name, where = source.name or source.data, f"{key}.{number}"
        if first.setdefault(name, number) != number:
            text = f"is called {shown(name)} like {key}.{first[name]}; give it another name"
            yield Problem((f"{where}.name", where), f"{where} {text}")
        if (source.weight is None) != (sources[0].weight is None):
            text = f"{key}: give a weight to each source, or to none"
            yield Problem((f"{where}.weight", where), text)
        yield from _check_filter(source.filter, f"{where}.filter")


def _check_filter(rules: FilterConfig, key: str) -> Iterator[Problem]:
    low, high = rules.min_caption_chars, rules.max_caption_chars
    if high is not None and low > high:
        keys = (f"{key}.min_caption_chars", f"{key}.max_caption_chars")
        yield Problem(keys, f"{keys[0]} ({low}) must be at most {keys[1]} ({high})")
    if rules.dedup_bits != FilterConfig().dedup_bits and rules.dedup != "perceptual":
        text = "does nothing without dedup: perceptual; add that, or remove it"
        yield Problem((f"{key}.dedup_bits",), f"{key}.dedup_bits ({rules.dedup_bits}) {text}")
