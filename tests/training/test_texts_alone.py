"""Texts without pictures in training: heads learn their words, pairs stay as they are."""

import io
import json
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlm.config.load import load_config
from vlm.data.transforms import normalize
from vlm.losses.caption import caption_targets
from vlm.models.text_encoder import trim
from vlm.runtime.distributed import Ranks
from vlm.training.setup import build_parts

HEAD = {"train.device": "cpu", "model.text.language_head": True, "loss.language_weight": 0.5}
MASKED = {"model.text.attention": "bidirectional", "model.text.pool": "mean"}


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def words(number):
    return f"{('a small red house', 'two green birds', 'the sun over a hill')[number % 3]} {number}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    members = [(f"{n}.txt", words(n).encode()) for n in range(48)]
    return write_tar(tmp_path_factory.mktemp("texts") / "texts.tar", members)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pictures, of which two in three have a false caption too."""
    members = []
    for n in range(48):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (5 * n, 250 - 5 * n, n)).save(file, "PNG")
        meta = {"caption": f"p {words(n)}", "wrong": words(n + 1) if n % 3 else None}
        members += [(f"{n}.png", file.getvalue()), (f"{n}.json", json.dumps(meta).encode())]
    return write_tar(tmp_path_factory.mktemp("pairs") / "pairs.tar", members)


def built(config, **changes):
    parts = build_parts(load_config(config, HEAD | changes), Ranks())
    batches = parts.batches(0, Ranks())
    batch = next(batches)
    batches.close()
    return parts, batch


def gradients(parts, batch, size=None):
    parts.step.module.zero_grad()
    terms = parts.step.objective.in_parts(size)(parts.step.module, batch)
    terms.loss.backward()
    found = {n: p.grad.clone() for n, p in parts.step.module.named_parameters()}
    return terms.shares, found


@pytest.mark.parametrize("changes", [{}, MASKED], ids=["causal", "masked"])
def test_words_are_learned_and_pairs_are_those_without_them(config, changes):
    parts, batch = built(config, **changes)
    alone = torch.arange(16) % 3 == 0
    mixed = replace(batch, valid=batch.valid & ~alone, texts_alone=alone)
    shares, found = gradients(parts, mixed)
    all_texts, _ = gradients(parts, batch)
    pairs, _ = gradients(parts, replace(batch, valid=batch.valid & ~alone))
    torch.testing.assert_close(shares["loss/contrastive"], pairs["loss/contrastive"])
    torch.testing.assert_close(shares["loss/language"], all_texts["loss/language"])
    assert (shares["num_valid"], shares["num_texts_alone"], shares["num_bad"]) == (16, 6, 0)
    images = batch.images.clone()
    images[alone] = 255
    again, _ = gradients(parts, replace(mixed, images=images))
    assert again["loss"] == shares["loss"]  # no picture is looked at where there is none
    for size in (5, 2):  # of two, some micro-batches have a single picture
        _, in_parts = gradients(parts, mixed, size)
        for name, gradient in found.items():
            torch.testing.assert_close(in_parts[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_captioner_reads_zeros_beside_a_text_alone(config):
    parts, batch = built(config)
    alone = torch.arange(16) % 3 == 0
    shares, _ = gradients(parts, replace(batch, valid=batch.valid & ~alone, texts_alone=alone))
    module, tokens = parts.step.module, trim(batch.tokens, parts.tokenizer.eot_id)
    with torch.no_grad():
        pixels = normalize(
            batch.images, mean=parts.step.objective.mean, std=parts.step.objective.std
        )
        image_tokens = module.encoders.image(pixels)[1].masked_fill(alone[:, None, None], 0.0)
        hidden = module.captioner(image_tokens, tokens[:, :-1])
        logits = hidden @ module.captioner.vocabulary.T
        *_, mask = caption_targets(tokens, parts.tokenizer.eot_id, torch.ones(16).bool())
        expected = torch.nn.functional.cross_entropy(logits[mask], tokens[:, 1:][mask])
    torch.testing.assert_close(shares["loss/caption"], expected)


def test_texts_alone_leave_the_image_encoder_as_it_is(config):
    parts, batch = built(config)
    parts.step(20, batch)  # fills the optimiser's momentum
    before = {name: p.clone() for name, p in parts.step.module.named_parameters()}
    alone = torch.ones(16).bool()
    result = parts.step(21, replace(batch, valid=~alone, texts_alone=alone))
    assert not result.skipped
    assert result.terms["loss/contrastive"] == 0
    assert result.terms["loss/language"] > 1 < result.terms["loss/caption"]
    after = dict(parts.step.module.named_parameters())
    changed = {n for n in before if not before[n].equal(after[n])}
    frozen = ("encoders.image", "encoders.logit_scale", "encoders.text.projection")
    assert not {name for name in changed if name.startswith(frozen)}
    assert {".".join(n.split(".")[:2]) for n in changed} >= {"encoders.text", "captioner.blocks"}


def test_ranks_and_micro_batches_share_pairs_texts_and_false_captions(
    start, metrics, pairs, texts, tmp_path
):
    """A micro-batch of two has often one picture, or none; fsdp shards what they share."""
    sources = json.dumps([{"data": str(d), "weight": 1} for d in (pairs, texts)])
    common = [f"data.train={sources}", "model.text.language_head=true", "optim.name=adamw"]
    common += ["data.hard_negatives=wrong", "train.steps=6"]
    more = {
        "parts": ["train.micro_batch_size=2"],
        "fsdp": ["train.strategy=fsdp", "train.ema_decay=0"],
    }
    runs = {}
    for name, world_size in {"one": 1, "two": 2, "parts": 2, "fsdp": 2}.items():
        options = [*common, *more.get(name, []), f"run.dir={tmp_path / name}"]
        start(*options, world_size=world_size).finish()
        runs[name] = metrics(tmp_path / name)
    for one, *others in zip(*runs.values(), strict=True):
        assert one["skipped_steps"] == one["bad_samples"] == 0
        for term in ("contrastive", "hard_negative", "caption", "language"):
            key = f"loss/{term}"
            assert one[key] > 0
            for other in others:
                assert other[key] == pytest.approx(one[key], rel=2e-5, abs=2e-5), (key, one["step"])
    assert runs["one"][-1]["passes/" + str(texts)] == pytest.approx(1.0)


def test_texts_as_the_only_source_want_a_frozen_image_encoder(start, metrics, texts, tmp_path):
    options = [f"data.train={texts}", "train.steps=4", "train.global_batch_size=8"]
    refused = start(*options, f"run.dir={tmp_path / 'refused'}")
    assert refused.wait() == [2]
    assert "without a single picture" in refused.text
    frozen = 'optim.trainable_groups={"encoders.image": 0}'
    start(*options, frozen, f"run.dir={tmp_path / 'run'}").finish()
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss/caption"] < lines[0]["loss/caption"]
    assert all(line["loss/contrastive"] == 0 for line in lines)


def test_texts_without_a_head_for_them_are_refused(config, start, texts, tmp_path):
    words = ["model.captioner=null", f"data.train={texts}"]
    refused = start(*words, f"run.dir={tmp_path / 'run'}")
    assert refused.wait() == [3]
    assert "no sample has an image field" in refused.text
    assert "model.text.language_head" in refused.text
