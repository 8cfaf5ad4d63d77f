"""Runs that begin with other runs' weights, and a head that learns answers on frozen encoders."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from vlm.config.load import load_config
from vlm.data.batch import HeadTexts
from vlm.data.questions import NOTHING
from vlm.errors import ConfigError
from vlm.inference import VisionLanguageModel
from vlm.losses.caption import caption_targets
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts

COCA = {"model.text.pool": "cls", "model.captioner.kind": "coca"}
FROZEN = {"encoders.image": 0, "encoders.text": 0}


def build(config, **changes):
    parts = build_parts(load_config(config, {"train.device": "cpu", **changes}), Ranks())
    batches = parts.batches(0, Ranks())
    batch = next(batches)
    batches.close()
    return parts, batch


@pytest.fixture
def trained(config, tmp_path):
    parts, batch = build(config, **{"train.seed": 3})
    for step in range(20, 24):
        parts.step(step, batch)
    model = VisionLanguageModel(
        parts.step.module, parts.config.model, parts.tokenizer, torch.device("cpu")
    )
    model.save(tmp_path / "trained")
    return tmp_path / "trained", model.model.state_dict()


def test_a_run_begins_with_the_weights_of_another(config, trained):
    parts, _ = build(config, **{"train.init_from": str(trained[0])})
    for name, tensor in parts.step.module.state_dict().items():
        assert tensor.equal(trained[1][name]), name


def test_what_the_other_lacks_is_fresh_and_told(config, trained, capsys):
    changes = {"train.init_from": str(trained[0]), "model.captioner.depth": 2}
    parts, _ = build(config, **changes)
    assert "has no captioner.blocks: fresh weights there" in capsys.readouterr().out
    mine = parts.step.module.state_dict()
    assert all(mine[name].equal(tensor) for name, tensor in trained[1].items())


def test_questions_that_no_sample_has_are_refused(config):
    with pytest.raises(ConfigError, match=r"""data.questions: no sample's json has a field .qaa"""):
        build(config, **{"data.questions": "qaa"})


def test_weights_of_another_shape_are_refused(config, trained):
    with pytest.raises(ConfigError, match=r"captioner\.\S+ is \(.*32.*\) in .*, \(.*16.*\) here"):
        build(config, **{"train.init_from": str(trained[0]), "model.captioner.width": 16})


def with_questions(parts, batch, num_given=4):
    """The captions as texts of which the first tokens are a prompt."""
    return replace(batch, head_texts=texts_of(parts, batch.tokens.flip(0), num_given))


def texts_of(parts, tokens, num_given=1):
    valid = torch.ones(len(tokens)).bool()
    _, targets, mask = caption_targets(tokens, parts.tokenizer.eot_id, valid)
    mask[:, : num_given - 1] = False
    return HeadTexts(tokens, pad(targets.masked_fill(~mask, NOTHING), (0, 1), value=NOTHING))


@pytest.mark.parametrize("changes", [{}, COCA], ids=["captioner", "coca"])
def test_a_head_on_frozen_encoders_learns_answers(config, changes):
    settings = {"optim.trainable_groups": FROZEN, "train.steps": 1000, "optim.lr": 5e-3}
    parts, batch = build(config, **changes, **settings)
    batch = with_questions(parts, batch)
    before = {n: p.clone() for n, p in parts.step.module.encoders.named_parameters()}
    losses = [parts.step(step, batch).terms["loss/caption"] for step in range(20, 60)]
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in parts.step.module.encoders.named_parameters():
        assert parameter.equal(before[name]) or "logit_scale" in name


def test_cocas_states_of_other_texts_are_those_of_its_text_encoder(config):
    parts, batch = build(config, **COCA)
    own = replace(batch, head_texts=texts_of(parts, batch.tokens))
    shares = [parts.step.objective(parts.step.module, b).shares for b in (batch, own)]
    torch.testing.assert_close(shares[0]["loss/caption"], shares[1]["loss/caption"])
    asked = parts.step.objective(parts.step.module, with_questions(parts, batch)).shares
    assert abs(float(asked["loss/caption"] - shares[0]["loss/caption"])) > 1e-3
