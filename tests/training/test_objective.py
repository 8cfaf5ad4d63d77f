"""The terms of the loss on a real model: Matryoshka prefixes and a teacher."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from vlm.config.load import load_config
from vlm.errors import ConfigError
from vlm.inference import VisionLanguageModel
from vlm.losses.contrastive import info_nce
from vlm.models.text_encoder import trim
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts
from vlm.training.wrapping import freeze


def build(config, **changes):
    parts = build_parts(load_config(config, {"train.device": "cpu", **changes}), Ranks())
    batches = parts.batches(0, Ranks())
    batch = next(batches)
    batches.close()
    return parts, batch


def features(parts, batch):
    objective = parts.step.objective
    seen = []
    hook = parts.step.module.register_forward_hook(lambda *args: seen.append(args[2]))
    objective(parts.step.module, batch)
    hook.remove()
    return seen[0]


def test_matryoshka_is_the_mean_over_prefixes_and_the_whole(config):
    parts, batch = build(config, **{"loss.matryoshka_dims": [4, 8]})
    outputs = features(parts, batch)
    found = parts.step.objective(parts.step.module, batch).shares["loss/contrastive"]
    pairs = parts.step.objective._pairs(batch)
    expected = [
        info_nce(
            normalize(outputs.image[:, :dim], dim=1),
            normalize(outputs.text[:, :dim], dim=1),
            outputs.logit_scale,
            pairs,
        )
        for dim in (4, 8, 16)
    ]
    assert float(found) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


@pytest.fixture
def teacher(config, tmp_path):
    parts, _ = build(config, **{"train.seed": 7, "model.image.image_size": 24})
    model = VisionLanguageModel(
        parts.step.module, parts.config.model, parts.tokenizer, torch.device("cpu")
    )
    model.save(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_teacher_of_another_image_size_is_learned_from(config, teacher):
    parts, batch = build(config, **{"loss.distill": str(teacher), "loss.distill_weight": 50.0})
    first = parts.step(20, batch)
    for step in range(21, 50):
        last = parts.step(step, batch)
    assert last.terms["loss/distill"] < first.terms["loss/distill"]
    assert all(p.grad is None for p in parts.step.objective.teacher.model.model.parameters())
    rest = first.terms["loss/contrastive"] + first.terms["loss/caption"]
    assert first.terms["loss"] == pytest.approx(rest + 50 * first.terms["loss/distill"], rel=1e-5)


def test_what_a_teacher_says_does_not_depend_on_micro_batches(config, teacher):
    whole, batch = build(config, **{"loss.distill": str(teacher)})
    parts, _ = build(config, **{"loss.distill": str(teacher), "train.micro_batch_size": 3})
    a, b = (p.step.objective(p.step.module, batch).shares for p in (whole, parts))
    assert float(a["loss/distill"]) == pytest.approx(float(b["loss/distill"]), rel=1e-6)


def counted(parts, batch):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        parts.step.objective(parts.step.module, batch).loss.backward()
    return counter.get_total_flops()


def test_what_a_teacher_and_prefixes_cost_is_what_pytorch_counts(config, teacher):
    plain, batch = build(config)
    more = {"loss.distill": str(teacher), "loss.matryoshka_dims": [4, 8]}
    parts, _ = build(config, **more)
    rows, length = batch.tokens.shape[0], trim(batch.tokens, parts.tokenizer.eot_id).shape[1]
    ours = [p.accounts.flops.step(rows, length).needed for p in (parts, plain)]
    theirs = [counted(p, batch) for p in (parts, plain)]
    assert ours[0] - ours[1] == pytest.approx(theirs[0] - theirs[1], rel=0.003)  # one tile again


def test_a_teacher_with_another_vocabulary_is_refused(config, teacher):
    with pytest.raises(ConfigError, match=r"another vocabulary; set model.text.tokenizer"):
        build(config, **{"loss.distill": str(teacher), "model.text.tokenizer": "bpe:300"})


def test_a_locked_tower_stays_and_the_rest_learns(config):
    parts, batch = build(config, **{"optim.trainable_groups": {"encoders.image": 1}})
    before = {n: p.clone() for n, p in parts.step.module.named_parameters()}
    parts.step(20, batch)
    after = dict(parts.step.module.named_parameters())
    same = {name for name in before if before[name].equal(after[name])}
    expected = {n for n in before if n.startswith("encoders.image.trunk")}
    assert same == expected


@pytest.mark.parametrize(("groups", "first"), [(0, None), (2, "blocks.0"), (3, "patch_embed")])
def test_groups_are_counted_from_the_projection(config, groups, first):
    parts, _ = build(config)
    freeze(parts.step.module, {"encoders.image": groups})
    learning = [
        n for n, p in parts.step.module.encoders.image.named_parameters() if p.requires_grad
    ]
    assert any(first in name for name in learning) if first else learning == []
    assert all(p.requires_grad for p in parts.step.module.encoders.text.parameters())


def test_a_part_that_is_not_there_is_refused(config):
    with pytest.raises(ConfigError, match=r"no encoders.audio; its parts are encoders.image, enc"):
        build(config, **{"optim.trainable_groups": {"encoders.audio": 1}})


def test_more_groups_than_there_are_are_refused(config):
    with pytest.raises(ConfigError, match=r"encoders.text has 3 layer groups, not 4"):
        build(config, **{"optim.trainable_groups": {"encoders.text": 4}})


@pytest.fixture
def convnext(config, tmp_path):
    """The config with a backbone whose `head.norm` serves a classifier that is not there."""
    lines = [line for line in config.read_text().splitlines() if "kwargs" not in line]
    path = tmp_path / "convnext.yaml"
    path.write_text("\n".join(lines).replace("vit_tiny_patch16_224", "test_convnext"))
    return path


def test_what_features_do_not_need_does_not_learn(convnext):
    parts, batch = build(convnext, **{"model.image.image_size": 32})
    still = {n for n, p in parts.step.module.named_parameters() if not p.requires_grad}
    assert still == {f"encoders.image.trunk.head.norm.{kind}" for kind in ("weight", "bias")}
    parts.step.objective(parts.step.module, batch).loss.backward()
    learning = [p for p in parts.step.module.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learning)
