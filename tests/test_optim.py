import pytest
import torch
from torch import nn

from vlm.errors import ConfigError
from vlm.optim import (
    AveragedWeights,
    Muon,
    build_optimizers,
    decays,
    lr_at,
    orthogonalize,
    set_lr,
)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("text.blocks.0.mlp.0.weight", (8, 4), True),
        ("text.token_embedding.weight", (8, 4), True),
        ("image.trunk.patch_embed.proj.weight", (8, 3, 2, 2), True),
        ("text.blocks.0.mlp.0.bias", (8,), False),
        ("text.norm.weight", (8,), False),
        ("logit_scale", (), False),
        ("text.positional_embedding", (8, 4), False),
        ("image.trunk.pos_embed", (1, 8, 4), False),
        ("image.trunk.cls_token", (1, 1, 4), False),
    ],
)
def test_decay_is_for_matrices_only(name, shape, expected):
    assert decays(name, torch.zeros(shape)) is expected


SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}


def test_muon_takes_the_matrices_inside_blocks_and_adamw_the_rest():
    model = nn.ModuleDict(
        {"text": nn.ModuleDict({"blocks": nn.Linear(3, 4), "end": nn.Linear(4, 2)})}
    )
    adamw, muon = build_optimizers(model, name="muon", **SETTINGS)
    (group,) = muon.param_groups
    assert group["params"] == [model["text"]["blocks"].weight]
    others = [p for g in adamw.param_groups for p in g["params"]]
    assert len(others) + 1 == len(list(model.parameters()))


def test_every_parameter_is_in_one_group():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    (optimizer,) = build_optimizers(model, name="adamw", **SETTINGS)
    decayed, rest = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_lr_scale_goes_by_the_longest_prefix_of_a_name():
    model = nn.ModuleDict({"head": nn.Linear(3, 4), "body": nn.Linear(4, 2)})
    optimizers = build_optimizers(
        model, name="adamw", lr_scale={"head": 2.0, "head.bias": 4.0}, **SETTINGS
    )
    set_lr(optimizers, 0.1)
    lrs = {p: group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert lrs[model["head"].weight] == pytest.approx(0.2)
    assert lrs[model["head"].bias] == pytest.approx(0.4)
    assert lrs[model["body"].weight] == lrs[model["body"].bias] == pytest.approx(0.1)


def test_lr_scale_for_no_parameter_is_refused():
    model = nn.ModuleDict({"head": nn.Linear(3, 4), "body": nn.Linear(4, 2)})
    with pytest.raises(ConfigError) as error:
        build_optimizers(model, name="adamw", lr_scale={"haed": 2.0}, **SETTINGS)
    assert error.value.problems == [
        "optim.lr_scale: no parameter's name begins with haed; the parts are body, head"
    ]


def test_schedule_rises_linearly_and_falls_as_a_cosine():
    lrs = [lr_at(s, lr=1.0, steps=110, warmup_steps=10, min_lr_fraction=0.1) for s in range(111)]
    assert lrs[0] == pytest.approx(0.1)
    assert lrs[9] == lrs[10] == pytest.approx(1.0)
    assert lrs[60] == pytest.approx(0.55)  # half way: the mean of the peak and the floor
    assert lrs[110] == pytest.approx(0.1)
    assert max(lrs) == 1.0


def schedule(name, steps=110, **changes):
    settings = {"lr": 1.0, "warmup_steps": 10, "min_lr_fraction": 0.1, **changes}
    return [lr_at(s, steps=steps, schedule=name, **settings) for s in range(steps + 1)]


def test_constant_stays_after_warm_up():
    assert schedule("constant")[9:] == [1.0] * 102


def test_wsd_stays_and_then_falls_as_one_less_a_root():
    lrs = schedule("wsd", decay_fraction=0.2)
    assert lrs[10:89] == [1.0] * 79  # 22 of 110 steps decay
    assert lrs[88 + 11] == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5))
    assert lrs[110] == pytest.approx(0.1)
    assert lrs[88:] == sorted(lrs[88:], reverse=True)


def test_a_longer_wsd_run_has_the_same_rate_until_the_shorter_one_decays():
    short, long = schedule("wsd"), schedule("wsd", steps=1000)
    assert short[:89] == long[:89]


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_a_run_shorter_than_its_warm_up_rises_to_its_end(name):
    lrs = schedule(name, steps=5)
    assert lrs == sorted(lrs)
    assert max(lrs) == pytest.approx(0.6)


def test_average_is_warmed_up_and_then_decays():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averaged = AveragedWeights(model, decay=0.5)
    nn.init.ones_(model.weight)
    averaged.update(model.named_parameters())
    assert averaged.shadow["weight"].item() == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    for _ in range(20):
        averaged.update(model.named_parameters())
    before = averaged.shadow["weight"].item()
    averaged.update([("weight", torch.zeros(1, 1))])
    assert averaged.shadow["weight"].item() == pytest.approx(before / 2)  # decay 0.5


def test_muon_is_torchs_muon_one_stack_at_a_time():
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5)]
    ours, theirs = ([nn.Parameter(torch.randn(s)) for s in shapes] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):  # bf16 products, summed in another order
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_orthogonalized_matrices_have_singular_values_near_one():
    for shape in ((2, 8, 5), (2, 5, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert 0.6 < values.min() < values.max() < 1.3
