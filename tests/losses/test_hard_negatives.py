"""A caption against one that is nearly true: the loss, and what reaches it from shards."""

import io
import json
import math
import tarfile
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from vlm.config.load import load_config
from vlm.data.batch import Negatives
from vlm.data.samples import BadSample, negatives_of
from vlm.errors import ConfigError
from vlm.losses.hard_negatives import hard_negative_loss
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts

CONFIG = """\
data: {{train: {data}, num_workers: 0, max_bad_fraction: 0.5}}
model:
  embed_dim: 16
  image:
    name: vit_tiny_patch16_224
    image_size: 16
    pool: avg
    kwargs: {{embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, class_token: false}}
  text: {{tokenizer: "bpe:300", context_length: 12, width: 32, depth: 1, num_heads: 2}}
optim: {{lr: 1e-3, warmup_steps: 0}}
train: {{steps: 30, global_batch_size: 8, precision: fp32, device: cpu}}
"""
ORDERS = ("red then blue", "blue then red")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Pictures of two colours in either order; captions tell which, words alone don't."""
    folder = tmp_path_factory.mktemp("pairs")
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number in range(16):
            truth = number % 2
            picture = Image.new("RGB", (16, 16), "red" if truth == 0 else "blue")
            picture.paste("blue" if truth == 0 else "red", (8, 0, 16, 16))
            file = io.BytesIO()
            picture.save(file, "PNG")
            meta = {"caption": ORDERS[truth], "swap": {"swapped": ORDERS[1 - truth]}}
            if number == 3:
                del meta["swap"]
            for suffix, data in (("png", file.getvalue()), ("json", json.dumps(meta).encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(data=folder / "pairs.tar"))
    return path


def build(config, **changes):
    settings = {"data.hard_negatives": "swap.swapped", **changes}
    parts = build_parts(load_config(config, settings), Ranks())
    batches = parts.batches(0, Ranks())
    taken = list(islice(batches, 2))
    batches.close()
    return parts, taken


def test_the_loss_is_a_softmax_over_two():
    image, text, negative = torch.nn.functional.normalize(torch.randn(3, 5, 4).double(), dim=-1)
    present = torch.tensor([True, True, False, True, True])
    expected = 0.0
    for i in (0, 1, 3, 4):
        true, false = (math.exp(7.0 * float(image[i] @ t[i])) for t in (text, negative))
        expected -= math.log(true / (true + false))
    found = hard_negative_loss(image, text, negative, torch.tensor(7.0).double(), present)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_what_is_false_of_a_picture_comes_with_it(config):
    parts, taken = build(config)
    for batch in taken:
        for row, number in enumerate(batch.sample_ids.tolist()):
            key = int(parts.data.dataset.key(number))
            assert bool(batch.negatives.present[row]) == (key != 3)
            false = parts.tokenizer.decode(batch.negatives.tokens[row]).strip()
            assert false == ("" if key == 3 else ORDERS[1 - key % 2])


def test_micro_batches_change_no_gradient(config):
    found = []
    for size in (None, 3):
        parts, (batch, _) = build(config, **{"train.micro_batch_size": size})
        batch = replace(batch, valid=batch.valid & (torch.arange(8) != 5))
        terms = parts.step.objective(parts.step.module, batch)
        terms.loss.backward()
        gradients = {n: p.grad for n, p in parts.step.module.named_parameters()}
        found.append((terms.shares["loss/hard_negative"], gradients))
    torch.testing.assert_close(*found)


def test_only_the_valid_and_present_count(config):
    parts, (batch, _) = build(config)
    one = torch.arange(8) == 2
    tokens = batch.negatives.tokens
    few = replace(batch, negatives=Negatives(tokens, one))
    invalid = replace(batch, valid=one, negatives=Negatives(tokens, torch.ones(8).bool()))
    a, b = (parts.step.objective(parts.step.module, x).shares for x in (few, invalid))
    torch.testing.assert_close(a["loss/hard_negative"], b["loss/hard_negative"])
    none = replace(batch, negatives=Negatives(tokens, torch.zeros(8).bool()))
    assert parts.step.objective(parts.step.module, none).shares["loss/hard_negative"] == 0


def test_the_weight_weighs(config):
    parts, (batch, _) = build(config, **{"loss.hard_negative_weight": 3.0})
    terms = parts.step.objective(parts.step.module, batch).shares
    whole = terms["loss/contrastive"] + 3 * terms["loss/hard_negative"]
    torch.testing.assert_close(terms["loss"], whole)


def test_pictures_and_captions_are_those_of_a_run_without(config):
    (_, asked), (_, plain) = build(config), build(config, **{"data.hard_negatives": None})
    assert plain[0].negatives is None
    for mine, theirs in zip(asked, plain, strict=True):
        assert mine.images.equal(theirs.images)
        assert mine.tokens.equal(theirs.tokens)


@pytest.mark.parametrize(
    ("meta", "texts"),
    [
        ({"no": "a"}, ("a", "a")),
        ({"no": ["a", "b"]}, ("a", "b")),
        ({"no": [None, "b"]}, (None, "b")),
        ({"no": [" ", "b"]}, (None, "b")),
        ({}, (None, None)),
        ({"no": None}, (None, None)),
    ],
)
def test_a_text_or_one_for_each_caption(meta, texts):
    assert negatives_of(meta, "no", 2) == texts
    assert negatives_of({"in": meta}, "in.no", 2) == texts
    assert negatives_of({f"in.{name}": text for name, text in meta.items()}, "in.no", 2) == texts


@pytest.mark.parametrize("value", [5, {"a": "b"}, [5, "a"], ["a"], []])
def test_what_is_no_text_is_a_bad_sample(value):
    with pytest.raises(BadSample, match=r"text.negatives"):
        negatives_of({"no": value}, "no", 2)


def test_a_field_that_no_sample_has_is_refused(config):
    with pytest.raises(ConfigError, match=r"data.hard_negatives: no sample's json has a field"):
        build(config, **{"data.hard_negatives": "swap.none"})


def test_a_weight_without_a_field_is_refused(config):
    with pytest.raises(ConfigError, match=r"loss.hard_negative_weight does nothing without"):
        build(config, **{"data.hard_negatives": None, "loss.hard_negative_weight": 2.0})


def test_tags_in_another_order_would_tell_the_true_caption(config):
    with pytest.raises(ConfigError, match=r"data.augment.shuffle_tags changes the caption alone"):
        build(config, **{"data.augment.shuffle_tags": True})


def test_what_they_cost_is_planned_and_counted(config):
    with_them, without = build(config)[0], build(config, **{"data.hard_negatives": None})[0]
    assert with_them.memory.per_row > without.memory.per_row
    flops = with_them.accounts.flops
    more = flops.step(8, 12, negatives=8).needed - flops.step(8, 12).needed
    assert more == flops.text(8, 12).needed > 0
