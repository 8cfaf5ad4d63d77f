from dataclasses import replace

import pytest
import torch

from vlm.heads.captioner import Captioner, Growing
from vlm.heads.coca import Coca, CocaDecoder
from vlm.models.text_encoder import TextEncoder
from vlm.models.transformer import KeysValues

SIZES = {"vocab_size": 20, "context_length": 12, "width": 16, "depth": 2, "num_heads": 2}


def louder(module):
    """Weights so large that every token's logits differ."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module.eval()


@pytest.fixture(params=["captioner", "coca"])
def decoder(request):
    torch.manual_seed(0)
    if request.param == "captioner":
        captioner = louder(Captioner(**SIZES, image_width=12))
        with torch.no_grad():
            captioner.token_embedding.weight[2] *= 3  # so that some texts end
        return captioner
    text = louder(TextEncoder(**SIZES, embed_dim=8, eot_id=2, pool="cls"))
    head = louder(Coca(**SIZES, image_width=12))
    with torch.no_grad():
        for layer in head.blocks:
            layer.cross.out.weight.mul_(5)  # so that the picture decides
    return CocaDecoder(text, head)


def _logits_of(decoder, image_tokens, tokens):
    """Of what follows each position, all computed at once."""
    if isinstance(decoder, Captioner):
        return decoder(image_tokens, tokens) @ decoder.vocabulary.T
    states = decoder.text(tokens)[1]
    return decoder.head(image_tokens, states) @ decoder.head.vocabulary.T


class _Uncached:
    """The same decoder, computing everything at every token; the texts so far lie in `past`."""

    def __init__(self, decoder):
        self.decoder = decoder

    def begin(self, image_tokens):
        return Growing([KeysValues(image_tokens, image_tokens)])

    def extend(self, texts, tokens):
        if texts.past:
            tokens = torch.cat([texts.past[0].keys, tokens], dim=1)
        logits = _logits_of(self.decoder, texts.images[0].keys, tokens)
        return logits[:, -1], replace(texts, past=[KeysValues(tokens, tokens)])


@pytest.fixture
def logits_of():
    return _logits_of


@pytest.fixture
def uncached():
    return _Uncached
