import copy

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from vlm.errors import ConfigError, DataError
from vlm.eval.explain import evaluating, integrated_gradients, look, shares, text_features

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
BACKBONES = {
    "class token": {},
    "mean": {"pool": "avg", "kwargs": VIT | {"class_token": False}},
    "mean beside a class token": {"pool": "avg"},
    "attention pool": {"pool": "map"},
    "convolutional stem": {"stem_channels": (8, 16, 32)},
    "registers": {"kwargs": VIT | {"reg_tokens": 4}},
    "patch dropout": {"patch_dropout": 0.5},
    "rotary": {"name": "eva02_tiny_patch14_224", "image_size": 56, "kwargs": {"depth": 1}},
    "convolutions": {"name": "convnext_atto", "image_size": 64, "pool": "avg", "kwargs": {}},
}


def cell(thing):
    """Row and column of a square."""
    return thing["box"][1] // 8, thing["box"][0] // 8


def test_integrated_gradients_of_a_polynomial_are_those_by_hand():
    # f = x y + 2 x: along x = y = t the gradients are (t + 2, t), whose means are 2.5 and 0.5.
    found = integrated_gradients(lambda x: x[:, 0] * x[:, 1] + 2 * x[:, 0], [2], num_steps=40)
    torch.testing.assert_close(found, torch.tensor([2.5, 0.5]))


def test_shares_of_a_hand_worked_case():
    # 2 logits in one region, 1 in another: 9/10 of their shares, and 1/10 spread over four.
    found = shares(torch.tensor([[0.2, 0.1], [-0.5, 0.0]]), logit_scale=10.0)
    torch.testing.assert_close(found, torch.tensor([[0.625, 0.325], [0.025, 0.025]]))
    assert torch.equal(shares(torch.zeros(2, 2), logit_scale=10.0), torch.full((2, 2), 0.25))


@pytest.mark.parametrize("name", BACKBONES)
def test_contributions_sum_to_what_the_picture_makes_of_the_similarity(
    make_encoders, painted, name
):
    model = make_encoders(**BACKBONES[name])
    explanation = vlm.explain(model, painted(0)[0], "a red square")
    view = look(model, explanation.picture)
    with torch.no_grad():
        blank = view.features(torch.zeros(1, *view.grid))[0] @ text_features(model, "a red square")
    assert explanation.contributions.shape == explanation.regions.shape == view.grid
    difference = explanation.similarity - float(blank)
    assert float(explanation.contributions.sum()) == pytest.approx(difference, rel=0.05, abs=1e-3)
    assert float(explanation.regions.sum()) == pytest.approx(1)
    assert explanation.similarity == pytest.approx(
        float(model.embed_images(painted(0)[0]) @ model.embed_texts("a red square").T), abs=1e-5
    )


def test_gradients_of_regions_are_finite_differences(make_encoders, painted):
    model = make_encoders(pool="map", stem_channels=(8, 16, 32))
    view = look(model, model.pixels([painted(0)[0]])[0])
    sentence = text_features(model, "a red square")
    shown = torch.full((1, 4, 4), 0.6, requires_grad=True)
    (gradient,) = torch.autograd.grad((view.features(shown) @ sentence).sum(), shown)
    with torch.no_grad():
        steps = 0.05 * torch.eye(16).view(16, 4, 4)
        up, down = (view.features(shown + sign * steps) @ sentence for sign in (1, -1))
    torch.testing.assert_close(gradient.flatten(), (up - down) / 0.1, rtol=0.05, atol=2e-5)


def test_the_right_square_gets_the_relevance(learned, painted):
    ratios = []
    for seed in range(6):
        picture, objects = painted(seed)
        for thing in objects:
            regions = vlm.explain(learned, picture, f"a {thing['name']} square").regions
            ratios.append(16 * float(regions[cell(thing)]))
    assert np.mean(ratios) > 8  # of 16 at most; an even map has 1
    assert min(ratios) > 1.5


def test_the_right_word_gets_the_relevance(learned, painted):
    hits = 0
    for seed in range(8):
        picture, objects = painted(seed)
        text = f"a {objects[0]['name']} square"
        words = vlm.explain(learned, picture, text).words
        assert [word for word, _ in words] == text.split()
        hits += max(words, key=lambda pair: pair[1])[0] == objects[0]["name"]
    assert hits >= 7


def test_words_sum_to_what_they_make_of_the_similarity(learned, painted):
    picture, text = painted(0)[0], "a red square, in grey"
    explanation = vlm.explain(learned, picture, text)
    assert [word for word, _ in explanation.words] == ["a", "red", "square", ",", "in", "grey"]
    encoder, tokens = learned.model.encoders.text, learned.tokenizer([text])
    lengths = torch.tensor([len(learned.tokenizer.encode(text))])
    with torch.no_grad():
        embedded = encoder.token_embedding(tokens)
        embedded[:, 1 : lengths[0] - 1] = encoder.token_embedding.weight.mean(dim=0)
        neutral = torch.nn.functional.normalize(
            encoder.from_embeddings(embedded, lengths)[0], dim=-1
        )
    difference = explanation.similarity - float(neutral @ learned.embed_images(picture).T)
    assert sum(value for _, value in explanation.words) == pytest.approx(difference, abs=0.02)


def test_a_text_without_words_has_none(learned, painted):
    assert vlm.explain(learned, painted(0)[0], "").words == []


@pytest.mark.parametrize("name", ["class token", "mean", "attention pool", "convolutional stem"])
def test_fresh_weights_give_a_map_without_bias(make_encoders, painted, name):
    """Neither the middle, nor the border, nor where something is painted."""
    maps, ratios = [], []
    settings = copy.deepcopy(BACKBONES[name])
    settings["kwargs"] = settings.get("kwargs", VIT) | {"embed_dim": 192}
    for seed in range(6):
        model = make_encoders(seed, embed_dim=192, **settings)
        for number in range(2):
            picture, objects = painted(10 * seed + number)
            text = f"a {objects[0]['name']} square"
            maps.append(vlm.explain(model, picture, text, num_steps=8).regions)
            ratios += [16 * float(maps[-1][cell(thing)]) for thing in objects]
    middle = torch.stack(maps)[:, 1:3, 1:3].sum(dim=(1, 2))
    assert 4 * float(middle.mean()) == pytest.approx(1, abs=0.1)
    assert np.mean(ratios) == pytest.approx(1, abs=0.2)


def test_the_model_is_left_as_it_was(make_encoders, painted):
    model = make_encoders(patch_dropout=0.5)
    module = model.model
    module.encoders.image.trunk.blocks.train()
    modes = [part.training for part in module.modules()]
    weights = copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    with torch.no_grad():
        vlm.explain(model, painted(0)[0], "a red square")
        vlm.faithfulness(model, painted(0)[0], "a red square")
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in module.parameters())
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_come_back_after_an_error(make_encoders):
    model = make_encoders()
    model.model.train()
    with pytest.raises(ConfigError, match="stop"), evaluating(model) as encoders:
        raise ConfigError("stop" if not encoders.training else "still training")
    assert all(part.training for part in model.model.modules())


def test_explaining_twice_gives_the_same_bits(learned, painted):
    first = vlm.explain(learned, painted(3)[0], "a blue square")
    with torch.inference_mode():
        again = vlm.explain(learned, painted(3)[0], "a blue square")
    assert torch.equal(first.contributions, again.contributions)
    assert first.words == again.words


def test_a_backbone_without_a_grid_is_one_clear_line(make_encoders, painted):
    model = make_encoders(name="resnet10t", pool="avg", kwargs={})
    with pytest.raises(ConfigError, match=r"resnet10t\): its 1 last tokens are no grid") as error:
        vlm.explain(model, painted(0)[0], "a red square")
    assert len(error.value.problems) == 1


def test_a_damaged_picture_is_named(learned, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        vlm.explain(learned, tmp_path / "bad.png", "a red square")


def test_the_overlay_is_lightest_where_the_relevance_is(learned, painted, tmp_path):
    picture, objects = painted(1)
    explanation = vlm.explain(learned, picture, f"a {objects[0]['name']} square")
    explanation.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert file.size == (448, 448)
        pixels = np.asarray(file.convert("RGB"), float)
    colourful = (pixels.max(axis=2) - pixels.min(axis=2)).reshape(4, 112, 4, 112).mean(axis=(1, 3))
    assert colourful.argmax() == int(explanation.regions.argmax())
