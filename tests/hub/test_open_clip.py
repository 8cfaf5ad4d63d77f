"""open_clip's weights under our names give open_clip's features and losses."""

from dataclasses import replace

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from vlm.config.schema import CaptionerConfig, ImageConfig, ModelConfig, TextConfig
from vlm.heads.generate import Decoding, generate
from vlm.heads.model import build_model
from vlm.hub.open_clip import translate
from vlm.models.text_encoder import trim
from vlm.tokenizer import clip_tokenizer

THEIRS = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2},
}
OURS = ModelConfig(
    embed_dim=24,
    image=ImageConfig(
        name="vit_base_patch32_clip_224",
        image_size=32,
        kwargs={"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8},
    ),
    text=TextConfig(context_length=20, width=48, depth=2, num_heads=2),
)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**THEIRS)
    ours = build_model(OURS, clip_tokenizer(20))
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs.eval(), ours.encoders.eval()


def test_features_are_theirs(models):
    theirs, ours = models
    pixels = torch.randn(3, 3, 32, 32)
    tokens = clip_tokenizer(20)(["a red bird", "two cats on a sofa", ""])
    torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels))
    short = trim(tokens, clip_tokenizer(20).eot_id)
    torch.testing.assert_close(ours.encode_text(short), theirs.encode_text(tokens))
    torch.testing.assert_close(ours.scale(), theirs.logit_scale.exp())


COCA = {
    **THEIRS,
    "embed_dim": 48,
    "vision_cfg": {
        **THEIRS["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_queries": 9,
        "output_tokens": True,
    },
    "text_cfg": {**THEIRS["text_cfg"], "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 48,
        "heads": 2,
        "layers": 2,
    },
}
OUR_COCA = replace(
    OURS,
    embed_dim=48,
    image=replace(
        OURS.image, pool="queries", num_queries=9, kwargs={**OURS.image.kwargs, "final_norm": False}
    ),
    text=replace(OURS.text, pool="cls"),
    captioner=CaptionerConfig(kind="coca", width=48, depth=2, num_heads=2),
)


def initialised(theirs):
    """Its decoder is uninitialised memory otherwise."""
    torch.manual_seed(1)
    for name, parameter in theirs.text_decoder.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return theirs


@pytest.fixture(scope="module")
def cocas():
    torch.manual_seed(0)
    theirs = initialised(open_clip.CoCa(**COCA))
    ours = build_model(OUR_COCA, clip_tokenizer(20))
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs.eval(), ours.eval()


def test_cocas_picture_and_next_token_logits_are_theirs(cocas):
    theirs, ours = cocas
    pixels, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 400, (3, 20))
    expected = theirs(pixels, tokens)
    image, image_tokens = ours.encoders.image(pixels)
    torch.testing.assert_close(normalize(image, dim=1), expected["image_features"])
    states = ours.encoders.text(tokens)[1][:, :-1]
    logits = ours.captioner(image_tokens, states) @ ours.captioner.vocabulary.T
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_a_full_text_has_their_features(cocas):
    theirs, ours = cocas
    tokens = torch.randint(1, 400, (2, 20))
    tokens[:, -1] = clip_tokenizer(20).eot_id
    torch.testing.assert_close(
        ours.encoders.encode_text(tokens, normalize=True), theirs.encode_text(tokens)
    )


def test_cocas_greedy_captions_are_those_of_a_loop_over_their_forward(cocas):
    theirs, ours = cocas
    tokenizer, pixels = clip_tokenizer(20), torch.randn(4, 3, 32, 32)
    prompt = torch.full((4, 1), tokenizer.sot_id)
    tokens = prompt
    with torch.no_grad():
        while tokens.shape[1] < 20:
            logits = theirs(pixels, tokens, output_labels=False)["logits"]
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    found = generate(
        ours.decoder(),
        ours.encoders.image.tokens(pixels),
        prompt,
        Decoding(),
        eot_id=tokenizer.eot_id,
        max_length=20,
    )
    assert tokens.equal(found)
    assert len(tokens.unique(dim=0)) == 4


def test_a_weight_that_has_no_place_is_refused():
    with pytest.raises(KeyError, match=r"visual.layer1.0.conv1.weight: open_clip's CLIP"):
        translate({"visual.layer1.0.conv1.weight": torch.zeros(1)})
