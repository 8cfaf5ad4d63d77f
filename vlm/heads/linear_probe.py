"""A linear classifier of frozen features: logistic regression, its lambda chosen by validation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.metrics.ranking import top_k_hits

EXPONENTS = tuple(step / 8 for step in range(-48, 49))  # lambda = 10^-6 .. 10^6, 8 a decade
_FIRST = range(0, len(EXPONENTS), 16)  # every second decade
_LOGITS_AT_ONCE = 2**24  # 64 MiB
_MAX_STEPS = 1000


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier.

    Attributes:
        weight: One row a class.
        bias: Of each class.
        l2: The lambda that it was fitted with.
    """

    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    l2: float

    def __call__(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Logits, in the type of the features."""
        dtype = features.dtype
        return torch.addmm(self.bias.to(dtype), features, self.weight.to(dtype).T)


@dataclass(frozen=True)
class Labelled:
    """Features, and the number of each one's class; -1 for a class that cannot be named."""

    features: Float[Tensor, "N D"]
    labels: Int[Tensor, " N"]


def fit(data: Labelled, *, num_classes: int, l2: float) -> LinearProbe:
    """The minimum of sum_i CE(W x_i + b, y_i) + l2/2 |W|^2: scikit-learn's, whose C is 1 / l2.

    By L-BFGS over all samples, from 0: where lambda is weak the search may end before the minimum,
    and what it began at would show. Products are of the features' type, a chunk of samples at a
    time; sums, weights and the search are fp64. With fp32 products the search ends where rounding
    hides the way down: gradients of 1e-5 a sample, which is still below scikit-learn's default.

    Args:
        data: What to fit; every label is below `num_classes`.
        num_classes: C.
        l2: Lambda. The bias is free of it.
    """
    num_dims = data.features.shape[1]
    # weight and bias in one tensor: the bias is the last column
    both = data.features.new_zeros(num_classes, num_dims + 1, dtype=torch.float64)
    search = torch.optim.LBFGS(
        [both],
        max_iter=_MAX_STEPS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, both.grad = _loss_and_gradient(both, data, l2)
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]  # torch's own
    return LinearProbe(both[:, :-1].clone(), both[:, -1].clone(), l2)


def choose_l2(
    train: Labelled, val: Labelled, *, num_classes: int
) -> tuple[LinearProbe, list[tuple[float, float]]]:
    """The best of the fits to `train` by the accuracy on `val`, and (lambda, accuracy) of each.

    CLIP's search (2103.00020, appendix A.3): every second decade of 10^-6 .. 10^6, then the steps
    around the best, halved down to an eighth of a decade. Of equal accuracies the one with the
    lower loss on `val` is better.
    """
    fits: dict[int, LinearProbe] = {}
    merits: dict[int, tuple[float, float]] = {}

    def best(numbers: Sequence[int]) -> int:
        for number in set(numbers) - fits.keys():
            fits[number] = fit(train, num_classes=num_classes, l2=10 ** EXPONENTS[number])
            merits[number] = _merit(fits[number], val)
        return max(fits, key=lambda n: merits[n])

    peak, span = best(_FIRST), 8
    while span:
        peak = best([n for n in (peak - span, peak + span) if 0 <= n < len(EXPONENTS)])
        span //= 2
    tried = [(fits[n].l2, merits[n][0]) for n in sorted(fits)]
    return fits[peak], tried


def _loss_and_gradient(both: Tensor, data: Labelled, l2: float) -> tuple[Tensor, Tensor]:
    """The objective divided by the number of samples, fp64: its scale is that of one sample's."""
    num_samples, weight = len(data.labels), both[:, :-1]
    probe = LinearProbe(weight, both[:, -1], l2)
    loss = l2 / 2 * weight.square().sum()
    gradient = torch.zeros_like(both)
    gradient[:, :-1] = l2 * weight
    for features, labels in _chunks(data, len(both)):
        log_p = probe(features).log_softmax(dim=1)
        loss -= log_p.gather(1, labels[:, None]).sum(dtype=torch.float64)
        error = log_p.exp_()
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        gradient[:, :-1] += error.T @ features
        gradient[:, -1] += error.sum(dim=0, dtype=torch.float64)
    return loss / num_samples, gradient / num_samples


def _merit(probe: LinearProbe, val: Labelled) -> tuple[float, float]:
    """Accuracy, and minus the loss of those whose class can be named."""
    hits = loss = 0.0
    for features, labels in _chunks(val, len(probe.bias)):
        known = labels >= 0
        logits, labels = probe(features[known]), labels[known]
        hits += int(top_k_hits(logits, labels, 1).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
    return hits / len(val.labels), -loss


def _chunks(data: Labelled, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _LOGITS_AT_ONCE // num_classes)
    return zip(torch.split(data.features, size), torch.split(data.labels, size), strict=True)
