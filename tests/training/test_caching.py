"""Micro-batches: the loss and the gradients are those of the whole batch."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.config.load import load_config
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts

COCA = {
    "model.image.pool": "queries",
    "model.image.num_queries": 5,
    "model.text.pool": "cls",
    "model.captioner.kind": "coca",
}


MASKED = {
    "model.text.language_head": True,
    "model.text.attention": "bidirectional",
    "model.text.pool": "mean",
}


@pytest.fixture(scope="module", params=[{}, COCA, MASKED], ids=["captioner", "coca", "masked"])
def parts(config, request):
    changes = {"loss.caption_every": 7, "train.global_batch_size": 24, **request.param}
    return build_parts(load_config(config, changes), Ranks())


@pytest.fixture(scope="module")
def batch(parts):
    batches = parts.batches(0, Ranks())
    batch = next(batches)
    batches.close()
    valid = batch.valid.clone()
    valid[[2, 20]] = False
    return replace(batch, valid=valid)


def gradients(parts, batch, micro_batch_size):
    step = parts.step
    step.module.zero_grad()
    terms = replace(step.objective, micro_batch_size=micro_batch_size)(step.module, batch)
    terms.loss.backward()
    found = {name: p.grad.clone() for name, p in step.module.named_parameters()}
    return terms, found


@pytest.mark.parametrize("micro_batch_size", [1, 5, 12, 23, 24, 100])
def test_micro_batches_have_the_gradient_of_the_whole(parts, batch, micro_batch_size):
    whole, expected = gradients(parts, batch, None)
    terms, found = gradients(parts, batch, micro_batch_size)
    torch.testing.assert_close(terms.loss, whole.loss, rtol=1e-6, atol=1e-6)
    for name, share in whole.shares.items():
        torch.testing.assert_close(terms.shares[name], share, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        rounding = 1e-6 * max(1.0, float(gradient.abs().max()))  # of the sums' largest terms
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=rounding, msg=name)


def test_only_a_micro_batch_is_kept(parts, batch):
    """What autograd holds between the forward and the backward pass: 4 samples of 24."""
    weights = {p.data_ptr() for p in parts.step.module.parameters()}
    kept = dict.fromkeys((None, 4), 0)

    def keep(tensor):
        kept[size] += tensor.nbytes * (tensor.data_ptr() not in weights)
        return tensor

    for size in kept:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            replace(parts.step.objective, micro_batch_size=size)(parts.step.module, batch)
    assert kept[4] < kept[None] / 4  # features and a gradient of the vocabulary are there, too


def test_a_vocabulary_has_one_gradient_for_each_pass_that_needs_it(parts, batch):
    """Micro-batches that are computed again find it then."""
    products = dict.fromkeys((None, 4), 0)
    shape = parts.step.module.captioner.vocabulary.shape

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            products[size] += function is torch.ops.aten.mm.default and out.shape == shape
            return out

    for size in products:
        with Note():
            replace(parts.step.objective, micro_batch_size=size)(parts.step.module, batch)
    assert products[4] == products[None] > 0


def test_micro_batches_leave_out_the_same_patches(config):
    changes = {"model.image.patch_dropout": 0.5, "train.global_batch_size": 24}
    parts = build_parts(load_config(config, changes), Ranks())
    batches = parts.batches(0, Ranks())
    batch = next(batches)
    batches.close()
    whole, expected = gradients(parts, batch, None)
    terms, found = gradients(parts, batch, 5)
    torch.testing.assert_close(terms.loss, whole.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
