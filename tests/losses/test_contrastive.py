"""What the losses are, on one process; ranks, tiles and gradients are in test_parity.py."""

import math
from dataclasses import replace

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize

from vlm.losses import tiles
from vlm.losses.contrastive import info_nce, sigmoid_loss
from vlm.losses.distillation import Teacher, distillation_loss
from vlm.losses.pairs import Pairs

BIAS = torch.tensor(-3.0, dtype=torch.float64)


def make_batch(rows, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(7.0, dtype=torch.float64)


def distinct(rows, **changes):
    ids = torch.arange(rows)
    valid = torch.ones(rows, dtype=torch.bool)
    return Pairs(**{"sample_ids": ids, "caption_ids": ids + 100, "valid": valid} | changes)


def sigmoid(image, text, scale, pairs):
    return sigmoid_loss(image, text, scale, BIAS, pairs)


both = pytest.mark.parametrize("loss", [info_nce, sigmoid])


def test_info_nce_is_open_clips_where_nothing_repeats():
    image, text, scale = make_batch(16)
    theirs = open_clip.loss.ClipLoss()(image, text, scale)
    ours = info_nce(image, text, scale, distinct(16))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_sigmoid_is_open_clips_where_nothing_repeats():
    image, text, scale = make_batch(16)
    theirs = open_clip.loss.SigLipLoss()(image, text, scale, BIAS)
    ours = sigmoid(image, text, scale, distinct(16))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("room_rows", [1, 3, 5, 100])
@pytest.mark.parametrize("tile_rows", [4, 7, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_that_are_computed_at_a_time_change_nothing(
    monkeypatch, room_rows, tile_rows, smoothing
):
    valid = torch.ones(17, dtype=torch.bool)
    valid[[2, 9]] = False
    pairs = distinct(17, caption_ids=torch.arange(17) % 6, valid=valid)
    found = []
    for rows, height in ((1000, 1000), (room_rows, tile_rows)):
        monkeypatch.setattr(tiles, "ROOM_BYTES", rows * 17 * 8)
        image, text, scale = make_batch(17)
        scale.requires_grad_()
        loss = info_nce(
            image, text, scale, pairs, label_smoothing=smoothing, tile_bytes=height * 17 * 8
        )
        found.append([loss, *torch.autograd.grad(loss, (image, text, scale))])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-13)


def test_label_smoothing_is_torchs():
    image, text, scale = make_batch(12)
    logits, labels = scale * image @ text.T, torch.arange(12)
    theirs = sum(F.cross_entropy(x, labels, label_smoothing=0.2) for x in (logits, logits.T)) / 2
    ours = info_nce(image, text, scale, distinct(12), label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@both
def test_its_gradient_is_the_numeric_one(loss):
    image, text, scale = make_batch(5, dim=3)
    pairs = distinct(5, caption_ids=torch.tensor([1, 1, 2, 3, 4]))
    scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: loss(*args, pairs), (image, text, scale))


def test_equal_features_give_log_of_the_batch_size():
    image = torch.ones(12, 4) / 2
    loss = info_nce(image, image, torch.tensor(50.0), distinct(12))
    assert float(loss) == pytest.approx(math.log(12), abs=1e-5)


def test_logits_far_apart_neither_overflow_nor_vanish():
    image = torch.eye(4)[[0, 0, 1]].requires_grad_()
    text = -torch.eye(4)[[0, 1, 1]]
    loss = info_nce(image, text, torch.tensor(100.0), distinct(3), tile_bytes=1)
    rows = [(-100, 0, 0), (-100, 0, 0), (0, -100, -100)]
    logits = torch.tensor(rows, dtype=torch.float64)
    labels = torch.arange(3)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert torch.autograd.grad(loss, image)[0].isfinite().all()


@both
def test_is_invariant_to_the_order_of_pairs(loss):
    image, text, scale = make_batch(10)
    pairs = distinct(10, caption_ids=torch.tensor([1, 1, 2, 3, 4, 5, 6, 7, 8, 2]))
    order = torch.randperm(10)
    shuffled = distinct(
        10, caption_ids=pairs.caption_ids[order], sample_ids=pairs.sample_ids[order]
    )
    torch.testing.assert_close(
        loss(image, text, scale, pairs), loss(image[order], text[order], scale, shuffled)
    )


@both
def test_a_bad_sample_has_no_gradient_and_moves_no_other(loss):
    image, text, scale = make_batch(6)
    valid = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    whole = loss(image, text, scale, distinct(6, valid=valid))
    gradient = torch.autograd.grad(whole, image, retain_graph=True)[0]
    assert gradient[3].abs().max() == 0
    torch.testing.assert_close(whole, loss(image[valid], text[valid], scale, distinct(5)))


@both
def test_a_batch_of_bad_samples_is_zero_and_finite(loss):
    image, text, scale = make_batch(4)
    total = loss(image, text, scale, distinct(4, valid=torch.zeros(4, dtype=torch.bool)))
    assert total == 0
    assert torch.autograd.grad(total, image)[0].isfinite().all()


@pytest.mark.parametrize("tile_bytes", [1, 5, 10, 1000])
def test_duplicates_are_counted(tile_bytes):
    pairs = distinct(5, caption_ids=torch.tensor([1, 1, 1, 2, 3]))
    assert pairs.num_duplicates(5, tile_bytes) == 6  # three rows, each with two others
    assert replace(pairs, valid=torch.tensor([1, 0, 1, 1, 1]).bool()).num_duplicates(5) == 2
    assert distinct(5).num_duplicates(5) == 0


def test_tiles_cover_the_rows_within_the_budget():
    pairs = distinct(10)
    for tile_bytes, heights in ((1, [1] * 7), (4 * 10 * 3, [3, 3, 1]), (10**9, [7])):
        tiles = [*pairs.tiles(7, 4, tile_bytes)]
        assert [tile.rows.stop - tile.rows.start for tile in tiles] == heights
        assert [tile.rows.start for tile in tiles] == [sum(heights[:n]) for n in range(len(tiles))]


@both
def test_a_second_backward_pass_gives_the_same(loss):
    image, text, scale = make_batch(6)
    total = loss(image, text, scale, distinct(6))
    first, second = (torch.autograd.grad(total, image, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


def teacher_of(rows, dim=5):
    image, text, _ = make_batch(rows, dim, seed=3)
    return Teacher(image.detach(), text.detach(), torch.tensor(4.0, dtype=torch.float64))


def test_distillation_is_open_clips():
    (image, text, scale), teacher = make_batch(16), teacher_of(16)
    theirs = open_clip.loss.DistillClipLoss().dist_loss(
        teacher.logit_scale * teacher.image @ teacher.all_text.T, scale * image @ text.T
    ) + open_clip.loss.DistillClipLoss().dist_loss(
        teacher.logit_scale * teacher.all_text @ teacher.image.T, scale * text @ image.T
    )
    ours = distillation_loss(image, text, scale, teacher, distinct(16))
    torch.testing.assert_close(ours, theirs / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile_bytes", [1, 2**30])
def test_distillation_has_the_numeric_gradient(tile_bytes):
    image, text, scale = make_batch(5)
    valid = torch.tensor([True, True, False, True, True])
    pairs = distinct(5, valid=valid, caption_ids=torch.tensor([1, 2, 3, 2, 5]))
    pairs = replace(pairs, duplicates="ignore")

    def loss(image, text, scale):
        return distillation_loss(image, text, scale, teacher_of(5), pairs, tile_bytes=tile_bytes)

    assert torch.autograd.gradcheck(loss, (image, text, scale.requires_grad_()))


def test_a_student_equal_to_its_teacher_has_no_gradient():
    image, text, scale = make_batch(6)
    teacher = Teacher(image.detach(), text.detach(), scale)
    distillation_loss(image, text, scale, teacher, distinct(6)).backward()
    assert image.grad.abs().max() < 1e-15
