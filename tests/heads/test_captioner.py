"""Both captioning heads: what a position sees, whole and token by token."""

import pytest
import torch


@pytest.fixture
def logits(decoder, logits_of):
    return lambda image, tokens: logits_of(decoder, image, tokens)


def test_a_position_sees_the_picture_and_what_came_before_and_nothing_after(logits):
    image, tokens = torch.randn(1, 4, 12), torch.tensor([[1, 5, 6, 7]])
    before = logits(image, tokens)
    changed = tokens.clone()
    changed[0, 3] = 9
    after = logits(image, changed)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3] - before[:, 3]).abs().max() > 1e-4
    assert (logits(torch.randn(1, 4, 12), tokens) - before).abs().max() > 1e-4


@torch.inference_mode()
def test_token_by_token_the_logits_are_those_of_the_whole_text(decoder, logits):
    image, tokens = torch.randn(3, 4, 12), torch.randint(3, 20, (3, 9))
    expected = logits(image, tokens)
    found, texts = decoder.extend(decoder.begin(image), tokens[:, :4])
    torch.testing.assert_close(found, expected[:, 3], rtol=1e-4, atol=1e-4)
    for place in range(4, 9):
        found, texts = decoder.extend(texts, tokens[:, place : place + 1])
        torch.testing.assert_close(found, expected[:, place], rtol=1e-4, atol=1e-4)
    assert texts.length == 9


def test_every_weight_of_a_head_is_initialised(decoder):
    """open_clip leaves CoCa's output projection as the memory was."""
    head = getattr(decoder, "head", decoder)
    fresh = type(head)(
        vocab_size=2000, context_length=12, width=64, depth=2, num_heads=2, image_width=12
    )
    for name, parameter in fresh.named_parameters():
        assert parameter.abs().max() < 2, name
        if parameter.ndim == 2:
            assert 0.005 < parameter.std() < 0.4, name
