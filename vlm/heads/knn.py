"""A classifier that asks the nearest pictures: their classes vote, weighted by similarity."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_NEIGHBOURS_AT_ONCE = 16384  # of the training pictures; a tile of scores is this by the queries


@dataclass(frozen=True)
class NearestNeighbours:
    """The k nearest by cosine vote, each with exp(cosine / temperature) (1805.01978, section 3.4).

    DINO's protocol (2104.14294, section 4.2) is k = 20 with a temperature of 0.07.

    Attributes:
        features: Of the training pictures, rows of length 1.
        labels: The number of each one's class.
        num_classes: C.
        k: How many vote; all, where there are fewer.
        temperature: The smaller, the more the nearest decides.
    """

    features: Float[Tensor, "N D"]
    labels: Int[Tensor, " N"]
    num_classes: int
    k: int = 20
    temperature: float = 0.07

    def __call__(self, features: Float[Tensor, "Q D"]) -> Float[Tensor, "Q C"]:
        """Votes of each class. The nearest picture's weight is 1: only ratios count."""
        scores, labels = self._nearest(features)
        weights = ((scores - scores.amax(dim=1, keepdim=True)) / self.temperature).exp()
        votes = features.new_zeros(len(features), self.num_classes)
        return votes.scatter_add_(1, labels, weights)

    def _nearest(self, queries: Tensor) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        """Cosines and classes of the nearest, a tile of training pictures at a time."""
        scores = queries.new_empty(len(queries), 0)
        labels = self.labels.new_empty(len(queries), 0)
        tiles = zip(
            torch.split(self.features, _NEIGHBOURS_AT_ONCE),
            torch.split(self.labels, _NEIGHBOURS_AT_ONCE),
            strict=True,
        )
        for tile, of_tile in tiles:
            scores = torch.cat([scores, queries @ tile.T], dim=1)
            labels = torch.cat([labels, of_tile.expand(len(queries), -1)], dim=1)
            scores, nearest = scores.topk(min(self.k, scores.shape[1]), dim=1)
            labels = labels.gather(1, nearest)
        return scores, labels
