import itertools
import statistics

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from vlm.metrics import classification, ranking
from vlm.runtime import torchvision_guard


@pytest.fixture
def theirs(monkeypatch):
    """CLIP_benchmark's own functions."""
    torchvision_guard.install()
    from clip_benchmark.metrics import zeroshot_classification

    # 1.6.2 calls float() on arrays of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(zeroshot_classification, "float", lambda value: value.item(), raising=False)
    return zeroshot_classification


def features(num, dim=64):
    return torch.nn.functional.normalize(torch.randn(num, dim), dim=1)


pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")


@pytest.mark.parametrize("num_classes", [5, 30, 1000])
def test_accuracy_and_recall_equal_clip_benchmarks(theirs, num_classes):
    logits = 100 * features(600) @ features(num_classes).T
    labels = torch.randint(num_classes, (600,))
    acc1, acc5 = theirs.accuracy(logits, labels, topk=(1, 5))
    assert ranking.top_k_accuracy(logits, labels, 1) == pytest.approx(acc1, abs=1e-6)
    assert ranking.top_k_accuracy(logits, labels, 5) == pytest.approx(acc5, abs=1e-6)
    recall = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert ranking.mean_per_class_recall(logits, labels) == pytest.approx(recall, abs=1e-6)


@pytest.mark.parametrize("num_classes", [12, 1000])
def test_classes_of_one_name_tie_as_in_clip_benchmark(theirs, num_classes):
    weights = features(num_classes)
    weights[7] = weights[3]
    labels = torch.tensor([3, 3, 7]).repeat(100)
    logits = 100 * (features(300) + 2 * weights[labels]) @ weights.T
    acc1, acc5 = theirs.accuracy(logits, labels, topk=(1, 5))
    assert 0.3 < acc1 < 0.8  # whichever of the two is chosen
    assert ranking.top_k_accuracy(logits, labels, 1) == pytest.approx(acc1, abs=1e-6)
    assert ranking.top_k_accuracy(logits, labels, 5) == pytest.approx(acc5, abs=1e-6)
    recall = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert ranking.mean_per_class_recall(logits, labels) == pytest.approx(recall, abs=1e-6)


def test_average_precision_equals_clip_benchmarks(theirs):
    logits = 100 * features(500) @ features(20).T
    targets = torch.rand(500, 20) < torch.linspace(0, 0.4, 20)  # the first class has no sample
    expected = theirs.average_precision_per_class(logits, targets)
    ours = classification.average_precision(logits, targets)[0]
    assert ours == pytest.approx(expected.numpy(), abs=1e-6)
    assert ours.mean() == pytest.approx(float(expected.mean()), abs=1e-6)
    assert ours[0] == 0


def test_a_resample_counts_samples_as_often_as_they_are_drawn():
    scores, targets = torch.randn(40, 3), torch.rand(40, 3) < 0.4
    counts = np.random.default_rng(0).integers(0, 2, (5, 40)).astype(float)
    found = classification.average_precision(scores, targets, counts)
    for row, drawn in zip(found, counts > 0, strict=True):
        chosen = classification.average_precision(scores[drawn], targets[drawn])
        assert row == pytest.approx(chosen[0], abs=1e-12)
    assert np.isnan(classification.average_precision(scores, targets, np.zeros((1, 40)))).all()


@pytest.mark.parametrize(("num_samples", "positives"), [(1, 1), (4, 1), (5, 2), (5, 5), (4, 0)])
def test_chance_average_precision_is_the_mean_over_every_order(num_samples, positives):
    found = []
    for places in itertools.permutations(range(num_samples)):
        scores = torch.tensor(places, dtype=torch.float32)[:, None]
        targets = (torch.arange(num_samples) < positives)[:, None]
        found.append(classification.average_precision(scores, targets)[0, 0])
    (chance,) = classification.chance_average_precision(torch.tensor([positives]), num_samples)
    assert chance == pytest.approx(statistics.fmean(found), abs=1e-12)


def test_calibration_error_equals_a_loop_over_the_bins():
    generator = np.random.default_rng(0)
    confidences, hits = generator.random(300), generator.random(300) < 0.5
    expected = 0.0
    for number in range(15):
        inside = (confidences > number / 15) & (confidences <= (number + 1) / 15)
        if inside.any():
            gap = abs(hits[inside].mean() - confidences[inside].mean())
            expected += inside.sum() / 300 * gap
    assert classification.calibration_error(confidences, hits) == pytest.approx([expected])


def test_calibration_error_of_hand_worked_cases():
    sure = np.ones(4)
    assert classification.calibration_error(sure, np.array([1, 1, 1, 1], bool)).tolist() == [0.0]
    half = np.array([True, False, True, False])
    assert classification.calibration_error(sure, half).tolist() == [0.5]
    counts = np.array([[1.0, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]])
    assert classification.calibration_error(sure, half, counts).tolist() == [0.0, 1.0, 0.5]


def test_a_calibrated_model_shows_the_error_of_chance():
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.2, 1, 1000)
    draws = generator.random((200, 1000)) < confidences
    found = [float(classification.calibration_error(confidences, hits)[0]) for hits in draws]
    chance = classification.chance_calibration_error(confidences)
    assert chance == pytest.approx(statistics.fmean(found), rel=0.05)


def test_confusion_matrix_has_the_truth_in_rows():
    matrix = classification.confusion_matrix(
        torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 2, 0]), 3
    )
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
