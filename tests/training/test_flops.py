"""FLOPs of a step: the published figures, and what PyTorch counts while it trains."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.config.load import load_config
from vlm.data.transforms import normalize
from vlm.heads.model import Captions, build_model
from vlm.losses import caption
from vlm.losses.caption import caption_targets
from vlm.runtime.device import arithmetic
from vlm.runtime.distributed import Ranks
from vlm.tokenizer import train_bpe
from vlm.training.flops import count_flops
from vlm.training.setup import build_parts


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a red square", "a blue circle"], vocab_size=400, context_length=12)


@pytest.fixture
def model(config, tokenizer):
    return build_model(load_config(config).model, tokenizer)


@pytest.fixture(autouse=True)
def no_padding(monkeypatch):
    """Rows that fill up a product are not needed, and PyTorch counts them."""
    monkeypatch.setattr(caption, "MULTIPLE", 1)


COCA = {
    "model.image.pool": "queries",
    "model.image.num_queries": 5,
    "model.text.pool": "cls",
    "model.captioner.kind": "coca",
}


def freeze(part):
    for parameter in part.parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [("clip_vit_b32", 8.82, 5.96), ("clip_vit_b16", 35.1, 5.96), ("clip_vit_l14", 162, 13.3)],
)
def test_a_sample_costs_what_is_published(name, image, text, tokenizer):
    with torch.device("meta"):
        model = build_model(load_config(name).model, tokenizer)
    flops = count_flops(model).step(1, 77)
    assert flops.image.forward == pytest.approx(image * 1e9, rel=0.02)
    assert flops.text.forward == pytest.approx(text * 1e9, rel=0.02)
    assert flops.image.needed == pytest.approx(3 * image * 1e9, rel=0.02)
    assert flops.text.needed == pytest.approx(3 * text * 1e9, rel=0.02)


def counted_by_pytorch(model, *, rows, length, every, precision="fp32"):
    """All products of forward and backward, captions of every n-th picture; not the loss."""
    images = torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8)
    tokens = torch.randint(3, 250, (rows, length))  # no end before the last
    tokens[:, -1] = model.encoders.text.eot_id
    captions = None
    if every:
        learned, valid = tokens[::every], torch.ones(rows, dtype=torch.bool)[::every]
        captions = Captions(0, every, True, *caption_targets(learned, int(tokens[0, -1]), valid))
    prepare = partial(normalize, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    # the CPU's fused kernel is not in PyTorch's list of what costs FLOPs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with arithmetic(precision, torch.device("cpu")):
            outputs = model(images, tokens, captions, prepare=prepare)
        total = outputs.image.sum() + outputs.text.sum()
        (total + outputs.caption_loss if captions else total).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("precision", "rows", "length", "every", "captioned"),
    [("fp32", 5, 12, 1, 5), ("fp32", 1, 2, 0, 0), ("bf16", 3, 7, 2, 2)],
)
def test_the_arithmetic_is_what_pytorch_counts(model, precision, rows, length, every, captioned):
    model.encoders.image.use_fused_attention(precision == "fp32")
    sizes = {"rows": rows, "length": length, "every": every}
    flops = count_flops(model).step(rows, length, captioned_rows=captioned)
    found = counted_by_pytorch(model, **sizes, precision=precision)
    assert flops.needed - flops.loss.needed == found


def test_coca_costs_what_pytorch_counts(config, tokenizer):
    settings = load_config(config, COCA).model
    model = build_model(settings, tokenizer)
    flops = count_flops(model).step(4, 9, captioned_rows=2)
    found = counted_by_pytorch(model, rows=4, length=9, every=2)
    assert flops.needed - flops.loss.needed == found


@pytest.mark.parametrize(
    "changes",
    [{}, {"model.text.attention": "bidirectional", "model.text.pool": "mean"}],
    ids=["next token", "masked"],
)
def test_language_modelling_costs_what_pytorch_counts(config, changes):
    """But for the share of a text that is masked, which is drawn."""
    settings = {"train.device": "cpu", "model.text.language_head": True, **changes}
    parts = build_parts(load_config(config, settings), Ranks())
    batches = parts.batches(0, Ranks())
    batch = next(batches)
    batches.close()
    tokens = batch.tokens.clone()
    tokens[:, 1:-1], tokens[:, -1] = 5, parts.tokenizer.eot_id  # no padding
    step = parts.step
    objective = replace(step.objective, captions=False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(step.module, replace(batch, tokens=tokens)).loss.backward()
    flops = count_flops(step.module).step(*tokens.shape)
    assert flops.needed == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("part", ["encoders.image.trunk", "encoders.text"])
def test_what_is_frozen_costs_what_pytorch_counts(model, part):
    freeze(model.get_submodule(part))
    flops = count_flops(model).step(4, 9, captioned_rows=2)
    assert flops.needed - flops.loss.needed == counted_by_pytorch(model, rows=4, length=9, every=2)


def test_a_frozen_tower_costs_a_third(model):
    before = count_flops(model).step(16, 12)
    freeze(model.encoders.text)
    flops = count_flops(model).step(16, 12)
    assert flops.text.needed == flops.text.forward == before.text.needed / 3
    assert flops.image == before.image
    assert flops.loss.needed == before.loss.needed * 2 / 3


def test_a_backbone_may_compute_something_once_for_the_whole_batch(config, tokenizer):
    settings = load_config(config).model
    image = replace(settings.image, name="test_vit_relpos", image_size=160, kwargs={})
    model = build_model(replace(settings, image=image), tokenizer)
    encoder = count_flops(model).image
    assert encoder.fixed.forward > 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encoders.image(torch.zeros(3, 3, 160, 160))
    assert encoder(3).forward == counter.get_total_flops()


def test_the_attention_kernel_makes_no_difference(model):
    counts = []
    for fused in (True, False):
        model.encoders.image.use_fused_attention(fused)
        counts.append(count_flops(model))
    assert counts[0] == counts[1]


def test_the_loss_needs_one_product_forward_and_two_backward(model):
    flops = count_flops(model)
    assert flops.step(8, 12).loss.forward == 2 * 8 * 8 * 16
    assert flops.step(8, 12, global_rows=32).loss.needed == 3 * 2 * 8 * 32 * 16


def test_recomputation_is_not_needed(model):
    flops = count_flops(model)
    whole = flops.step(16, 12, captioned_rows=16)
    parts = flops.step(16, 12, captioned_rows=16, micro_batch_size=4)
    assert whole.recomputed == flops.step(16, 12, micro_batch_size=16).recomputed == 0
    assert parts.needed == whole.needed
    forward = whole.image.forward + whole.text.forward + whole.captioner.forward
    assert parts.recomputed == forward * 12 / 16  # the backward pass begins with the last part
    uneven = flops.step(16, 12, captioned_rows=16, micro_batch_size=6)
    assert uneven.recomputed == forward * 10 / 16  # parts of 4, 6 and 6
    tiled = flops.step(1024, 12, global_rows=32768)
    assert tiled.recomputed == tiled.loss.forward


def test_counting_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_numbers = torch.get_rng_state()
    count_flops(model)
    after = model.state_dict()
    assert all(before[name].equal(after[name]) for name in before)
    assert torch.get_rng_state().equal(random_numbers)
    assert all(parameter.grad is None for parameter in model.parameters())
