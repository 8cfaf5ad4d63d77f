import pytest
import torch

from vlm.models.text_encoder import TextEncoder, text_lengths, trim

EOT = 2


def make_encoder(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "context_length": 12, "width": 16, "depth": 2, "num_heads": 2}
    return TextEncoder(**sizes | {"embed_dim": 8, "eot_id": EOT} | changes)


def make_tokens(lengths, width=12):
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(3, 50, (length - 1,))
        tokens[row, length - 1] = EOT
    return tokens


def test_lengths_count_up_to_the_first_end_token():
    tokens = torch.tensor([[1, 5, EOT, 0], [1, EOT, EOT, EOT]])
    assert text_lengths(tokens, EOT).tolist() == [3, 2]


@pytest.mark.parametrize("pool", ["eot", "cls"])
def test_trimmed_texts_have_the_features_of_padded_ones(pool):
    encoder, tokens = make_encoder(pool=pool).double(), make_tokens([3, 7, 5])
    trimmed = trim(tokens, EOT)
    assert trimmed.shape == (3, 7)
    torch.testing.assert_close(encoder(trimmed)[0], encoder(tokens)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["eot", "cls"])
def test_what_follows_the_end_token_does_not_matter(pool):
    encoder, tokens = make_encoder(pool=pool), make_tokens([4, 6])
    noisy = tokens.clone()
    noisy[0, 4:] = 7
    torch.testing.assert_close(encoder(noisy)[0], encoder(tokens)[0])


@pytest.mark.parametrize("pool", ["eot", "cls"])
def test_what_precedes_it_does(pool):
    encoder, tokens = make_encoder(pool=pool), make_tokens([6])
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % 47 + 3
    assert (encoder(changed)[0] - encoder(tokens)[0]).abs().max() > 1e-4


def test_a_class_token_changes_no_state_of_the_text():
    encoder, tokens = make_encoder(pool="cls"), make_tokens([4, 6])
    states = encoder(tokens)[1]
    assert states.shape == (2, 12, 16)
    with torch.no_grad():
        encoder.class_embedding.add_(1.0)
    torch.testing.assert_close(encoder(tokens)[1], states)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_equals_open_clips_text_tower_with_its_weights(activation):
    """The same Transformer as CLIP's, weight by weight."""
    import open_clip.transformer
    from torch import nn

    act = nn.GELU if activation == "gelu" else open_clip.transformer.QuickGELU
    theirs = open_clip.transformer.TextTransformer(
        context_length=12, vocab_size=50, width=16, heads=2, layers=2, output_dim=8, act_layer=act
    ).eval()
    theirs.pool_type = "argmax"
    ours = make_encoder(eot_id=49, activation=activation)
    names = {
        "token_embedding.weight": "token_embedding.weight",
        "positional_embedding": "positional_embedding",
        "norm.weight": "ln_final.weight",
        "norm.bias": "ln_final.bias",
    }
    block = {
        "norm_attention": "ln_1",
        "attention.qkv.weight": "attn.in_proj_weight",
        "attention.qkv.bias": "attn.in_proj_bias",
        "attention.out": "attn.out_proj",
        "norm_mlp": "ln_2",
        "mlp.0": "mlp.c_fc",
        "mlp.2": "mlp.c_proj",
    }
    source = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name == "projection.weight":
                parameter.copy_(source["text_projection"].T)
            elif name in names:
                parameter.copy_(source[names[name]])
            else:
                key = next(k for k in block if f".{k}" in name)
                layer, rest = name.split(".")[1], name.split(key)[1]
                parameter.copy_(source[f"transformer.resblocks.{layer}.{block[key]}{rest}"])
    tokens = make_tokens([5, 9, 12])
    tokens[tokens == EOT] = 49  # open_clip pools at the largest id
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens), rtol=1e-5, atol=1e-5)


def test_embedded_tokens_have_the_features_of_the_tokens():
    encoder, tokens = make_encoder(), make_tokens([4, 6])
    embedded = encoder.token_embedding(tokens)
    features, _ = encoder.from_embeddings(embedded, text_lengths(tokens, EOT))
    assert torch.equal(features, encoder(tokens)[0])
