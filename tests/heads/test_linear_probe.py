"""The linear probe against scikit-learn, and how its lambda is found."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn.functional import cross_entropy, normalize

from vlm.heads import linear_probe
from vlm.heads.linear_probe import Labelled, LinearProbe, choose_l2, fit

NUM_CLASSES, NUM_DIMS = 8, 24


@pytest.fixture(scope="module")
def sample():
    """Draws noisy pictures of eight classes; not a third of them can be told for sure."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(NUM_CLASSES, NUM_DIMS, generator=generator)

    def sample(num):
        labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
        noise = torch.randn(num, NUM_DIMS, generator=generator)
        return Labelled(normalize(0.5 * centres[labels] + noise, dim=1), labels)

    return sample


def accuracy(probe, data):
    return (probe(data.features).argmax(dim=1) == data.labels).double().mean().item()


def theirs(data, l2):
    """scikit-learn's fit."""
    model = LogisticRegression(C=1 / l2, max_iter=1000, tol=1e-6)
    with threadpool_limits(1):
        model.fit(data.features.double().numpy(), data.labels.numpy())
    return LinearProbe(torch.tensor(model.coef_), torch.tensor(model.intercept_), l2)


def objective(probe, data):
    logits = data.features.double() @ probe.weight.T + probe.bias
    loss = cross_entropy(logits, data.labels, reduction="sum")
    return float(loss + probe.l2 / 2 * probe.weight.square().sum())


@pytest.mark.parametrize("l2", [0.01, 1.0, 100.0])
def test_a_fit_is_scikit_learns(sample, l2):
    data = sample(400)
    ours, sklearns = fit(data, num_classes=NUM_CLASSES, l2=l2), theirs(data, l2)
    assert objective(ours, data) == pytest.approx(objective(sklearns, data), rel=1e-5)
    assert ours(data.features) == pytest.approx(sklearns(data.features), abs=0.05)


def test_a_fit_does_not_depend_on_the_chunk(sample, monkeypatch):
    data = sample(200)
    whole = fit(data, num_classes=NUM_CLASSES, l2=0.5)
    monkeypatch.setattr(linear_probe, "_LOGITS_AT_ONCE", 7 * NUM_CLASSES)
    by_chunk = fit(data, num_classes=NUM_CLASSES, l2=0.5)
    assert by_chunk(data.features) == pytest.approx(whole(data.features), abs=1e-3)


def test_the_chosen_lambda_is_within_half_a_point_of_the_best_of_a_grid(sample):
    train, val, test = sample(300), sample(300), sample(2000)
    best, tried = choose_l2(train, val, num_classes=NUM_CLASSES)
    grid = [theirs(train, 10.0**exponent) for exponent in range(-2, 5)]
    assert accuracy(best, val) >= max(accuracy(probe, val) for probe in grid) - 0.005
    assert accuracy(best, test) >= max(accuracy(probe, test) for probe in grid) - 0.005
    assert accuracy(best, test) > 0.5  # of eight classes
    assert dict(tried)[best.l2] == max(dict(tried).values())


def test_lambda_is_searched_in_eighths_of_a_decade_around_the_best(sample):
    best, tried = choose_l2(sample(200), sample(200), num_classes=NUM_CLASSES)
    exponents = torch.tensor([l2 for l2, _ in tried]).log10()
    assert {-6, -4, -2, 0, 2, 4, 6} <= {round(e, 3) for e in exponents.tolist()}
    near = (exponents - torch.tensor(best.l2).log10()).abs().sort().values
    assert near[1:3].tolist() == pytest.approx([0.125, 0.125], abs=1e-3)
    assert len(tried) <= 15


def test_a_class_that_cannot_be_named_counts_as_a_miss_where_lambda_is_chosen(sample):
    train, val = sample(200), sample(50)
    unknown = Labelled(val.features, torch.full_like(val.labels, -1))
    both = Labelled(
        torch.cat([val.features, unknown.features]), torch.cat([val.labels, unknown.labels])
    )
    _, tried = choose_l2(train, val, num_classes=NUM_CLASSES)
    _, halved = choose_l2(train, both, num_classes=NUM_CLASSES)
    assert [accuracy for _, accuracy in halved] == [accuracy / 2 for _, accuracy in tried]
