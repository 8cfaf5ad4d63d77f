"""Whether an explanation is true: what the similarity does as regions are hidden or shown."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.data.pictures import Picture
from vlm.eval.explain import BATCH_SIZE, Explanation, View, evaluating, explain, look, text_features
from vlm.heads.model import build_model
from vlm.inference import VisionLanguageModel

NUM_POINTS = 17  # of a curve, ends included
NUM_RANDOM = 8  # orders that the random area is the mean of
NUM_FRESH = 4  # models with fresh weights: each has a bias of its own


@dataclass(frozen=True)
class Areas:
    """Areas under the curves of the cosine over the share of regions hidden or shown.

    Attributes:
        deletion: The most relevant regions are hidden first: lower is better.
        insertion: They are shown first: higher is better.
    """

    deletion: float
    insertion: float


@dataclass(frozen=True)
class Faithfulness:
    """Deletion and insertion (Petsiuk, Das and Saenko, arXiv 1806.07421, section 4.3).

    Unlike there, the curve is that of the similarity and not of a class's probability, and hidden
    regions have the picture's mean colour in both, as in the explanation itself.

    Attributes:
        explained: In the explanation's order.
        fresh: In the orders of models with fresh weights, averaged; near `random` if the
            explanation tells of what was learned (Adebayo et al., arXiv 1810.03292).
        random: In random orders, deletion and insertion alike: one is the other backwards.
    """

    explained: Areas
    fresh: Areas
    random: float


def faithfulness(
    model: VisionLanguageModel, image: Picture, text: str, *, seed: int = 0
) -> Faithfulness:
    """How faithful the explanation of a similarity is.

    Args:
        model: As for `explain`.
        image: As for `explain`.
        text: As for `explain`.
        seed: Of the random orders, and the first one of the fresh weights.

    Raises:
        ConfigError: As `explain`.
        DataError: The picture is damaged.
    """
    mine = explain(model, image, text)
    others = [reinitialised(model, seed + number) for number in range(NUM_FRESH)]
    return judge(model, text, mine, [explain(other, image, text) for other in others], seed=seed)


def judge(
    model: VisionLanguageModel,
    text: str,
    mine: Explanation,
    fresh: Sequence[Explanation],
    *,
    seed: int = 0,
) -> Faithfulness:
    """The areas of explanations of one similarity: the model's, and those of fresh weights."""
    with evaluating(model), torch.no_grad():
        view, sentence = look(model, mine.picture), text_features(model, text)

        def areas(explanations: Sequence[Explanation]) -> Areas:
            relevance = torch.stack([each.contributions.flatten() for each in explanations])
            order = relevance.argsort(dim=1, descending=True)
            return Areas(_area(view, sentence, order), _area(view, sentence, order.flip(1)))

        orders = _random_orders(mine.regions.numel(), seed)
        return Faithfulness(areas([mine]), areas(fresh), _area(view, sentence, orders))


def reinitialised(model: VisionLanguageModel, seed: int = 0) -> VisionLanguageModel:
    """The same model with fresh weights, those of the seed; its temperature is fresh, too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of other devices
        module = build_model(model.config, model.tokenizer)
    return VisionLanguageModel(module, model.config, model.tokenizer, model.device)


def hidden_in(order: Int[Tensor, " N"]) -> Float[Tensor, "K N"]:
    """How the first regions of an order are hidden, point by point: masks of ones and zeros."""
    hidden = torch.linspace(0, len(order), min(NUM_POINTS, len(order) + 1)).round()
    return (order.argsort() >= hidden[:, None]).float()


def _area(view: View, sentence: Tensor, orders: Int[Tensor, "R N"]) -> float:
    """The area under the curve as regions are hidden in each order, averaged over these.

    Showing them in an order is hiding them backwards, read from the other end.
    """
    masks = torch.cat([hidden_in(order) for order in orders]).view(-1, *view.grid)
    parts = [view.features(part) @ sentence for part in torch.split(masks, 4 * BATCH_SIZE)]
    curves = torch.cat(parts).view(len(orders), -1)
    hidden = 1 - masks.flatten(1).mean(dim=1).view(len(orders), -1).to(curves)
    return float(torch.trapezoid(curves, hidden, dim=1).mean())


def _random_orders(num_regions: int, seed: int) -> Int[Tensor, "R N"]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(NUM_RANDOM, num_regions, generator=generator)
    return draws.argsort(dim=1)
