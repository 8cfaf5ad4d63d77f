import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.losses.caption import caption_loss, caption_targets, computed_again

SOT, EOT, PAD = 1, 2, 0


def test_targets_end_with_the_end_of_text_and_leave_padding_and_bad_samples_out():
    tokens = torch.tensor(
        [[SOT, 5, 6, EOT, PAD], [SOT, EOT, PAD, PAD, PAD], [SOT, 7, EOT, PAD, PAD]]
    )
    inputs, targets, mask = caption_targets(tokens, EOT, torch.tensor([True, True, False]))
    assert inputs.shape == targets.shape == (3, 4)
    assert targets[mask].tolist() == [5, 6, EOT, EOT]


def test_an_end_token_equal_to_the_padding_counts_once():
    tokens = torch.tensor([[SOT, 5, EOT, EOT, EOT]])
    _, targets, mask = caption_targets(tokens, EOT, torch.tensor([True]))
    assert targets[mask].tolist() == [5, EOT]


def make(dtype=torch.float64, rows=6, width=8, vocabulary=10):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 4, width), (vocabulary, width)
    hidden, weight = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    tokens = torch.tensor([[SOT, 5, 6, EOT, PAD], [SOT, EOT, PAD, PAD, PAD]]).repeat(rows // 2, 1)
    _, targets, mask = caption_targets(tokens, EOT, torch.arange(rows) != 2)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, mask


def dense(hidden, weight, targets, mask):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits[mask], targets[mask], reduction="sum")


@pytest.mark.parametrize("tile_bytes", [1, 2**30])
def test_loss_and_gradients_are_those_of_all_logits(tile_bytes):
    hidden, weight, targets, mask = make(width=2 if tile_bytes == 1 else 8)
    found = caption_loss(hidden, weight, targets, mask, tile_bytes=tile_bytes)
    expected = dense(hidden, weight, targets, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_under_autocast_products_are_bf16_and_the_sum_is_fp32():
    hidden, weight, targets, mask = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = caption_loss(hidden, weight, targets, mask)
        expected = dense(hidden, weight, targets, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward()
    assert weight.grad.dtype == torch.float32


def test_no_more_logits_exist_than_the_vocabulary_takes():
    hidden, weight, targets, mask = make(torch.float32, rows=2000, width=64, vocabulary=3000)
    sizes, heights = [], set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                heights.add(len(args[0]))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, tuple) else [out])
                if isinstance(t, torch.Tensor)
            )
            return out

    with Note():
        caption_loss(hidden, weight, targets, mask, tile_bytes=1)
    assert max(sizes) <= max(weight.numel(), hidden.numel())
    assert mask.sum() * len(weight) > 10 * max(sizes)
    assert not any(height % 64 for height in heights - {len(weight)})  # each is a kernel that stays


def test_the_gradient_is_left_to_the_second_time():
    tensors = make(torch.float32)
    products = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                products.append(function)
            return function(*args, **(kwargs or {}))

    with Note():
        with computed_again():
            first = caption_loss(*tensors)
        assert len(products) == 1
        second = caption_loss(*tensors)
        assert len(products) == 1 + 3
    assert first == second
    first.backward()
    assert tensors[1].grad.isnan().all()  # nobody can take it for one


def test_a_batch_without_a_real_token_has_no_loss():
    hidden, weight, targets, mask = make()
    loss = caption_loss(hidden, weight, targets, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
