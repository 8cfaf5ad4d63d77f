import pytest
import torch
from torch import nn

from vlm.errors import ConfigError
from vlm.models.image_encoder import ImageEncoder, PatchDropout, PatchProjection

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def make_encoder(name="vit_tiny_patch16_224", **changes):
    settings = {"image_size": 32, "embed_dim": 8, "kwargs": TINY}
    return ImageEncoder(name, **settings | changes).eval()


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_pools_to_one_feature_a_picture(pool):
    features, tokens = make_encoder(pool=pool)(torch.randn(3, 3, 32, 32))
    assert features.shape == (3, 8)
    assert tokens.shape == (3, 17, 32)  # 16 patches and the class token


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_convolutional_backbones_give_tokens(name):
    features, tokens = make_encoder(name, pool="avg", image_size=64, kwargs={})(
        torch.randn(2, 3, 64, 64)
    )
    assert features.shape == (2, 8)
    assert tokens.shape[1] == 4


def test_the_convolutional_stem_makes_as_many_tokens_as_patches():
    encoder = make_encoder(stem_channels=[4, 8, 16])
    assert encoder(torch.randn(2, 3, 32, 32))[1].shape == (2, 17, 32)


def test_plain_attention_equals_fused():
    encoder, pixels = make_encoder(), torch.randn(2, 3, 32, 32)
    fused = encoder(pixels)[0]
    encoder.use_fused_attention(False)
    torch.testing.assert_close(encoder(pixels)[0], fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_tinny"}, 'model.image.name: timm has no "vit_tinny"; near: '),
        ({"name": "resnet10t", "kwargs": {}}, "resnet10t has no class token; use avg or map"),
        (
            {"stem_channels": [4, 8]},
            "2 convolutions of stride 2 make patches of 4 pixels, but patch_size is 8; "
            "set model.image.kwargs.patch_size=4",
        ),
        ({"kwargs": {"depht": 3}}, "model.image: timm refuses vit_tiny_patch16_224 with "),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError) as error:
        make_encoder(**changes)
    assert message in str(error.value)


def test_patches_are_projected_as_the_convolution_does():
    torch.manual_seed(0)
    for size in ((32, 32), (35, 50)):
        convolution = nn.Conv2d(3, 7, 8, stride=8)
        pixels = torch.randn(2, 3, *size)
        torch.testing.assert_close(PatchProjection(convolution)(pixels), convolution(pixels))


def test_a_vision_transformer_has_no_convolution_left():
    encoder = ImageEncoder("vit_base_patch32_clip_224", image_size=224, embed_dim=8)
    assert not [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert encoder.state_dict()["trunk.patch_embed.proj.weight"].shape == (768, 3, 32, 32)


def test_what_patch_dropout_leaves_follows_from_the_visit_alone():
    torch.manual_seed(0)
    dropout = PatchDropout(0.75, num_prefix_tokens=1).train()
    tokens = torch.arange(65.0).repeat(6, 1)[..., None]  # each token is its number
    visits = torch.tensor([5, 6, 7, 8, 5, -9])
    dropout.visits = visits
    whole = dropout(tokens)
    assert whole.shape == (6, 17, 1)
    assert not whole[:, 0].any()  # the class token stays
    for rows in (slice(0, 2), slice(2, 6)):
        dropout.visits = visits[rows]
        assert dropout(tokens[rows]).equal(whole[rows])
    assert whole[0].equal(whole[4])
    assert all(len(row.unique()) == 17 for row in whole)
    assert not whole[0].equal(whole[1])
    assert dropout.eval()(tokens).equal(tokens)


def test_patch_dropout_leaves_each_patch_equally_often():
    dropout = PatchDropout(0.5, num_prefix_tokens=0).train()
    dropout.visits = torch.arange(4000)
    kept = dropout(torch.arange(16.0).repeat(4000, 1)[..., None])
    counts = torch.bincount(kept.flatten().long(), minlength=16)
    assert (counts - 2000).abs().max() < 150  # 5 standard deviations


def test_a_backbone_without_patches_refuses_patch_dropout():
    with pytest.raises(ConfigError, match=r"resnet10t has no patches to leave out"):
        make_encoder("resnet10t", kwargs={}, pool="avg", patch_dropout=0.5)
