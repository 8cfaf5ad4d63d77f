"""open_clip's weights under our names give open_clip's features and losses."""

import open_clip
import pytest
import torch

from vlm.config.schema import ImageConfig, ModelConfig, TextConfig
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


def test_a_weight_that_has_no_place_is_refused():
    with pytest.raises(KeyError, match=r"visual.layer1.0.conv1.weight: open_clip's Vision"):
        translate({"visual.layer1.0.conv1.weight": torch.zeros(1)})
