"""Language modelling: what is hidden, what is predicted, and that it can be learned."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from vlm.heads.language import MASKED, LanguageHead, language_states, language_targets
from vlm.models.text_encoder import TextEncoder

EOT, LENGTH = 2, 12


def texts(lengths):
    tokens = torch.full((len(lengths), LENGTH), EOT)
    for row, length in enumerate(lengths):
        tokens[row, 0] = 1
        tokens[row, 1 : length - 1] = torch.randint(3, 20, (length - 2,))
    return tokens


def targets_of(tokens, *, causal, visits=None):
    visits = torch.arange(len(tokens)) * 7919 if visits is None else visits
    valid = torch.ones(len(tokens), dtype=torch.bool)
    return language_targets(tokens, EOT, valid, visits, causal=causal)


def test_a_causal_encoder_predicts_all_but_the_first_token_and_no_padding():
    tokens = texts([5, 12, 3])
    found = targets_of(tokens, causal=True)
    assert found.hidden is None
    assert found.mask.sum(dim=1).tolist() == [4, 11, 2]
    assert found.targets[0][found.mask[0]].tolist() == tokens[0, 1:5].tolist()


def test_a_bidirectional_one_predicts_what_it_does_not_see():
    tokens = texts([12] * 4000)
    found = targets_of(tokens, causal=False)
    assert found.mask.equal(found.hidden)
    assert not found.mask[:, 0].any()
    assert float(found.mask[:, 1:].float().mean()) == pytest.approx(MASKED, abs=0.01)
    assert not targets_of(texts([4] * 100), causal=False).mask[:, 4:].any()


def test_what_is_hidden_follows_from_the_visit_alone():
    tokens = texts([12] * 50)
    whole = targets_of(tokens, causal=False, visits=torch.arange(50))
    part = targets_of(tokens[20:30], causal=False, visits=torch.arange(20, 30))
    assert part.hidden.equal(whole.hidden[20:30])


def test_invalid_texts_are_not_learned():
    valid = torch.tensor([True, False])
    for causal in (True, False):
        mask = language_targets(texts([12, 12]), EOT, valid, torch.arange(2), causal=causal).mask
        assert not mask[1].any()


def make_encoder(*, causal):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "context_length": LENGTH, "width": 32, "depth": 2, "num_heads": 2}
    pool = "eot" if causal else "mean"
    return TextEncoder(**sizes, embed_dim=8, eot_id=EOT, causal=causal, pool=pool)


@pytest.fixture(params=[True, False], ids=["causal", "bidirectional"])
def encoder(request):
    return make_encoder(causal=request.param)


def loss_of(encoder, head, tokens, found):
    states = encoder(tokens)[1]
    hidden = language_states(encoder, head, tokens, found, states)
    logits = hidden @ encoder.token_embedding.weight.T
    return cross_entropy(logits[found.mask], found.targets[found.mask])


def test_a_hidden_token_changes_nothing_but_its_target():
    encoder = make_encoder(causal=False)
    head, tokens = LanguageHead(32, masked=True), texts([12] * 30)
    found = targets_of(tokens, causal=False)
    other = torch.where(found.hidden & (tokens != EOT), 3 + (tokens - 2) % 17, tokens)
    assert not other.equal(tokens)
    states = [language_states(encoder, head, t, found, encoder(t)[1]) for t in (tokens, other)]
    torch.testing.assert_close(states[0], states[1])


def test_a_pattern_is_learned(encoder):
    """Texts that count: each token says what the next one is, and what the one before was."""
    head = LanguageHead(32, masked=not encoder.causal)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(120):
        first = torch.randint(0, 17, (64, 1), generator=torch.Generator().manual_seed(step))
        tokens = torch.cat([torch.ones_like(first), 3 + (first + torch.arange(10)) % 17], dim=1)
        tokens = torch.cat([tokens, torch.full_like(first, EOT)], dim=1)
        visits = torch.arange(64) + 1000 * step
        found = targets_of(tokens, causal=encoder.causal, visits=visits)
        loss = loss_of(encoder, head, tokens, found)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2.5
    assert sum(losses[-10:]) / 10 < 0.8  # the first of a text can't be known: 0.26 at best


def test_a_bidirectional_text_has_the_features_of_a_padded_one(encoder):
    tokens = texts([5, 9])
    padded, trimmed = encoder.double()(tokens)[0], encoder(tokens[:, :9])[0]
    torch.testing.assert_close(padded, trimmed, rtol=0, atol=1e-12)
