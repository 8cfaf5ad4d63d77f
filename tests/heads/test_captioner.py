import torch

from vlm.heads.captioner import Captioner, greedy

EOT = 2


def make_captioner():
    torch.manual_seed(0)
    return Captioner(
        vocab_size=20, context_length=8, width=16, depth=2, num_heads=2, image_width=12
    ).eval()


def test_a_position_sees_the_picture_and_what_came_before_and_nothing_after():
    captioner, image = make_captioner(), torch.randn(1, 4, 12)
    tokens = torch.tensor([[1, 5, 6, 7]])
    logits = captioner.logits(image, tokens)
    changed = tokens.clone()
    changed[0, 3] = 9
    after = captioner.logits(image, changed)
    torch.testing.assert_close(after[:, :3], logits[:, :3])
    assert (after[:, 3] - logits[:, 3]).abs().max() > 1e-4
    assert (captioner.logits(torch.randn(1, 4, 12), tokens) - logits).abs().max() > 1e-4


def test_greedy_takes_the_likeliest_token_each_step_and_stops_at_the_end():
    captioner, image = make_captioner(), torch.randn(3, 4, 12)
    start = torch.tensor([[1]] * 3)
    tokens = greedy(captioner, image, start, eot_id=EOT, max_length=8)
    for row in range(3):
        line = [1]
        while len(line) < tokens.shape[1]:
            logits = captioner.logits(image[row : row + 1], torch.tensor([line]))
            line.append(EOT if EOT in line else int(logits[0, -1].argmax()))
        assert tokens[row].tolist() == line


def test_captions_do_not_depend_on_the_rest_of_the_batch():
    captioner, image = make_captioner(), torch.randn(4, 4, 12)
    start = torch.tensor([[1]] * 4)
    together = greedy(captioner, image, start, eot_id=EOT, max_length=8)
    alone = greedy(captioner, image[2:3], start[:1], eot_id=EOT, max_length=8)
    assert together[2, : alone.shape[1]].tolist() == alone[0].tolist()
