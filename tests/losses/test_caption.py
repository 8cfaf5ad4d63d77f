import torch

from vlm.losses.caption import caption_loss, caption_targets

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


def test_loss_is_a_sum_over_real_tokens():
    logits = torch.randn(2, 4, 10, dtype=torch.float64)
    tokens = torch.tensor([[SOT, 5, 6, EOT, PAD], [SOT, EOT, PAD, PAD, PAD]])
    _, targets, mask = caption_targets(tokens, EOT, torch.tensor([True, True]))
    log_p = logits.float().log_softmax(-1)
    expected = -(log_p[0, 0, 5] + log_p[0, 1, 6] + log_p[0, 2, EOT] + log_p[1, 0, EOT])
    torch.testing.assert_close(caption_loss(logits, targets, mask), expected)
