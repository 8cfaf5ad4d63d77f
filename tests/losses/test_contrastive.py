import math

import open_clip.loss
import pytest
import torch
from torch.nn.functional import normalize

from vlm.losses.contrastive import Pairs, info_nce, num_duplicates


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


def whole(image, text, scale, pairs):
    return info_nce(image, text, image, text, scale, pairs)


def loop_reference(image, text, scale, pairs):
    """The formula of the design, written with loops over valid rows and columns."""
    keep = [i for i in range(len(image)) if pairs.valid[i]]
    total = 0.0
    for queries, keys in ((image, text), (text, image)):
        for i in keep:
            match = [
                j
                for j in keep
                if pairs.sample_ids[i] == pairs.sample_ids[j]
                or pairs.caption_ids[i] == pairs.caption_ids[j]
            ]
            columns, targets = keep, match
            if pairs.duplicates != "positive":
                targets = [i]
            if pairs.duplicates == "ignore":
                columns = [j for j in keep if j == i or j not in match]
            s = {j: scale * (queries[i] @ keys[j]) for j in columns}
            lse = torch.logsumexp(torch.stack([s[j] for j in columns]), 0)
            total = total + lse - sum(s[j] for j in targets) / len(targets)
    return total / (2 * len(keep))


@pytest.mark.parametrize("duplicates", ["positive", "ignore", "negative"])
def test_equals_a_loop_with_duplicates_and_bad_samples(duplicates):
    image, text, scale = make_batch(9)
    pairs = distinct(
        9,
        caption_ids=torch.tensor([1, 2, 1, 3, 4, 1, 5, 6, 3]),
        sample_ids=torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 8]),
        valid=torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool),
        duplicates=duplicates,
    )
    ours, theirs = (f(image, text, scale, pairs) for f in (whole, loop_reference))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (image, text)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_equals_open_clip_where_nothing_repeats():
    image, text, scale = make_batch(16)
    theirs = open_clip.loss.ClipLoss()(image, text, scale)
    torch.testing.assert_close(whole(image, text, scale, distinct(16)), theirs, rtol=0, atol=1e-12)


def test_equal_features_give_log_of_the_batch_size():
    image = torch.ones(12, 4) / 2
    loss = whole(image, image, torch.tensor(50.0), distinct(12))
    assert float(loss) == pytest.approx(math.log(12), abs=1e-5)


def test_is_invariant_to_the_order_of_pairs():
    image, text, scale = make_batch(10)
    pairs = distinct(10, caption_ids=torch.tensor([1, 1, 2, 3, 4, 5, 6, 7, 8, 2]))
    order = torch.randperm(10)
    shuffled = distinct(
        10, caption_ids=pairs.caption_ids[order], sample_ids=pairs.sample_ids[order]
    )
    torch.testing.assert_close(
        whole(image, text, scale, pairs), whole(image[order], text[order], scale, shuffled)
    )


def test_shares_of_ranks_add_up_to_the_loss():
    image, text, scale = make_batch(8)
    pairs = distinct(8, caption_ids=torch.tensor([1, 2, 1, 3, 4, 1, 5, 6]))
    shares = [
        info_nce(
            image[offset : offset + 2],
            text[offset : offset + 2],
            image,
            text,
            scale,
            distinct(8, caption_ids=pairs.caption_ids, offset=offset),
        )
        for offset in (0, 2, 4, 6)
    ]
    torch.testing.assert_close(sum(shares), whole(image, text, scale, pairs))


def test_a_bad_sample_has_no_gradient_and_moves_no_other():
    image, text, scale = make_batch(6)
    valid = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    loss = whole(image, text, scale, distinct(6, valid=valid))
    gradient = torch.autograd.grad(loss, image)[0]
    assert gradient[3].abs().max() == 0
    without = whole(image[valid], text[valid], scale, distinct(5))
    torch.testing.assert_close(loss, without)


def test_duplicates_are_counted():
    pairs = distinct(5, caption_ids=torch.tensor([1, 1, 1, 2, 3]))
    assert num_duplicates(pairs, 5) == 6  # three rows, each with two others


def test_a_batch_of_bad_samples_is_zero_and_finite():
    image, text, scale = make_batch(4)
    loss = whole(image, text, scale, distinct(4, valid=torch.zeros(4, dtype=torch.bool)))
    assert loss == 0
    assert torch.autograd.grad(loss, image)[0].isfinite().all()
