"""One step on a real model: what is updated, what is skipped."""

import pytest
import torch

from vlm.config.load import load_config
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts


@pytest.fixture
def parts(config):
    return build_parts(load_config(config), Ranks())


def weights(parts):
    return {name: tensor.clone() for name, tensor in parts.step.module.state_dict().items()}


def test_a_step_changes_every_parameter(parts):
    before = weights(parts)
    parts.step(20, next(parts.batches(0, Ranks())))
    after = parts.step.module.state_dict()
    assert [name for name in before if before[name].equal(after[name])] == []


def test_a_gradient_that_is_not_finite_changes_nothing(parts):
    batch = next(parts.batches(0, Ranks()))
    parts.step.module.encoders.text.norm.weight.register_hook(lambda g: g * float("nan"))
    before = weights(parts)
    result = parts.step(20, batch)
    assert result.skipped
    after = parts.step.module.state_dict()
    assert all(before[name].equal(after[name]) for name in before)


def test_first_loss_is_near_chance(parts):
    result = parts.step(0, next(parts.batches(0, Ranks())))
    vocabulary = torch.tensor(float(parts.tokenizer.vocab_size))
    assert result.terms["loss/caption"] == pytest.approx(float(vocabulary.log()), rel=0.1)
    assert result.num_valid == 16
