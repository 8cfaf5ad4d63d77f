"""Which regions of a picture and which words of a text make them similar."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vlm.data import transforms
from vlm.data.pictures import Picture
from vlm.errors import ConfigError
from vlm.eval.overlay import draw_overlay
from vlm.inference import VisionLanguageModel
from vlm.models.dual_encoder import DualEncoder
from vlm.models.text_encoder import text_lengths
from vlm.runtime.files import write_atomic

NUM_STEPS = 32  # of the path: on small models the parts miss their sum by about 1%
BATCH_SIZE = 16  # pictures held with their gradients at a time


@dataclass(frozen=True)
class Explanation:
    """What a similarity comes from.

    Attributes:
        similarity: The cosine of picture and text.
        regions: The relevance of each region, positive, sums to 1: one region for each token of
            the backbone's last layer, as they lie in the picture. An even map says that the
            similarity does not depend on the picture; see `shares`.
        contributions: What each region adds to the cosine, or takes from it. They sum to the
            difference that the picture makes to an even area of its mean colour.
        words: Each word, and what it adds to the cosine or takes from it. They sum to the
            difference that the words make to as many tokens that say nothing.
        picture: As the model sees it.
    """

    similarity: float
    regions: Float[Tensor, "h w"]
    contributions: Float[Tensor, "h w"]
    words: list[tuple[str, float]]
    picture: UInt8[Tensor, "3 S S"]

    def overlay(self, side: int = 448) -> Image.Image:
        """The regions as a heat map over the picture, as large as `side` or more."""
        return draw_overlay(self.picture, self.regions, side=side)

    def save(self, path: str | Path) -> None:
        """Write the overlay as a PNG, over whatever is there.

        Raises:
            DiskError: It cannot be written.
        """
        buffer = BytesIO()
        self.overlay().save(buffer, "PNG")
        write_atomic(Path(path), buffer.getvalue())


def explain(
    model: VisionLanguageModel, image: Picture, text: str, *, num_steps: int = NUM_STEPS
) -> Explanation:
    """The relevance of a picture's regions and of a text's words for their similarity.

    Integrated gradients (Sundararajan, Taly and Yan, arXiv 1703.01365, equation 1), not for each
    number of the input but for the visibility of each region and of each word: the gradients of the
    cosine for these, averaged along the straight path from nothing visible to all. So it needs no
    look inside the backbone, whatever its stem, attention and pooling. A region that is not visible
    has the picture's mean colour, a word the mean of all tokens' embeddings.

    The same inputs give the same explanation. The model is left as it was.

    Args:
        model: Any whose backbone keeps a grid of tokens.
        image: One, as `VisionLanguageModel.embed_images` takes it.
        text: What the picture is compared with.
        num_steps: Points on the path; each costs a pass forward and back.

    Raises:
        ConfigError: The picture cannot be read, or the backbone's tokens are no grid.
        DataError: The picture is damaged.
    """
    pixels = model.pixels([image])[0]
    with evaluating(model) as encoders:
        view = look(model, pixels)
        sentence = text_features(model, text)
        contributions = integrated_gradients(
            lambda shown: view.features(shown) @ sentence, view.grid, num_steps=num_steps
        )
        with torch.no_grad():
            picture = encoders.encode_image(view.pixels, normalize=True)[0]
        words = _word_relevance(model, text, picture, num_steps)
    return Explanation(
        similarity=float(picture @ sentence),
        regions=shares(contributions, model.logit_scale),
        contributions=contributions,
        words=words,
        picture=pixels,
    )


def shares(contributions: Float[Tensor, "h w"], logit_scale: float) -> Float[Tensor, "h w"]:
    """Contributions to a cosine as positive relevance that sums to 1.

    Positive contributions count in logits, as the model's own softmax weighs them. With S logits in
    all, the map is S^2 / (S^2 + 1) of their shares and for the rest even: a Wiener filter for noise
    of one logit. A trained model's similarities are several logits; fresh weights owe a picture a
    fraction of one, and their shares alone would follow the edges of whatever is in it.
    """
    evidence = (logit_scale * contributions).relu()
    total = evidence.sum()
    return (1 / evidence.numel() + total * evidence) / (1 + total**2)


def integrated_gradients(
    score: Callable[[Tensor], Tensor], shape: Sequence[int], *, num_steps: int = NUM_STEPS
) -> Float[Tensor, "*shape"]:
    """The integral of the gradient of `score` from zeros to ones, by the midpoint rule.

    Args:
        score: Of inputs [B, *shape]: [B].
        shape: Of one input.
        num_steps: Points on the path.
    """
    path = (torch.arange(num_steps) + 0.5) / num_steps
    total = torch.zeros(*shape)
    for points in torch.split(path, BATCH_SIZE):
        inputs = points.view(-1, *[1] * len(shape)).expand(-1, *shape).clone().requires_grad_()
        (gradients,) = torch.autograd.grad(score(inputs).sum(), inputs)
        total += gradients.sum(dim=0)
    return total / num_steps


@dataclass(frozen=True)
class View:
    """A picture whose regions can be hidden.

    Attributes:
        encoders: Who looks.
        pixels: [1, 3, S, S], as the image encoder takes them.
        grid: Rows and columns of regions: the backbone's last tokens.
    """

    encoders: DualEncoder
    pixels: Tensor
    grid: tuple[int, int]

    def features(self, shown: Float[Tensor, "B h w"]) -> Float[Tensor, "B D"]:
        """L2-normalised features of the picture with so much of each region shown, in 0..1.

        What is hidden has the mean colour of the picture: a blur would leave small objects' colours
        where they were.
        """
        mean = self.pixels.mean(dim=(2, 3), keepdim=True)
        shown = interpolate(shown[:, None].to(mean), size=self.pixels.shape[2:], mode="nearest")
        return self.encoders.encode_image(mean + shown * (self.pixels - mean), normalize=True)


def look(model: VisionLanguageModel, pixels: UInt8[Tensor, "3 S S"]) -> View:
    """A model's view of a picture.

    Raises:
        ConfigError: The backbone's last tokens are no grid.
    """
    preprocess, encoders = model.preprocess, model.model.encoders
    ready = transforms.normalize(pixels[None].to(model.device), preprocess.mean, preprocess.std)
    with torch.no_grad():
        num_tokens = encoders.image.tokens(ready).shape[1] - encoders.image.num_prefix_tokens
    side = math.isqrt(num_tokens)
    if side < 2 or side * side != num_tokens:
        raise ConfigError(
            f"model.image.name ({model.config.image.name}): its {num_tokens} last tokens are no "
            "grid of regions to explain; it takes a backbone that keeps 2 x 2 or more, as vit_* do"
        )
    return View(encoders, ready, (side, side))


@torch.no_grad()
def text_features(model: VisionLanguageModel, text: str) -> Float[Tensor, " D"]:
    """A text's L2-normalised features, on the model's device."""
    tokens = model.tokenizer([text]).to(model.device)
    return model.model.encoders.encode_text(tokens, normalize=True)[0]


def _word_relevance(
    model: VisionLanguageModel, text: str, picture: Tensor, num_steps: int
) -> list[tuple[str, float]]:
    """What each word adds to the cosine, its tokens hidden together."""
    words, encoder = model.tokenizer.words(text), model.model.encoders.text
    if not words:
        return []
    tokens = model.tokenizer([text]).to(model.device)
    lengths = text_lengths(tokens, model.tokenizer.eot_id)
    word_of = torch.full((tokens.shape[1],), len(words))  # what is no word is always shown
    for number, (_, places) in enumerate(words):
        word_of[places] = number
    embedded = encoder.token_embedding(tokens).detach()  # [1, L, W]
    neutral = encoder.token_embedding.weight.detach().mean(dim=0)

    def score(shown: Tensor) -> Tensor:
        always = torch.ones(len(shown), 1)
        of_tokens = torch.cat([shown, always], dim=1)[:, word_of, None].to(embedded)  # [B, L, 1]
        mixed = neutral + of_tokens * (embedded - neutral)
        features = encoder.from_embeddings(mixed, lengths.expand(len(shown)))[0]
        return normalize(features.float(), dim=-1) @ picture

    relevance = integrated_gradients(score, [len(words)], num_steps=num_steps)
    return [(word, float(value)) for (word, _), value in zip(words, relevance, strict=True)]


@contextmanager
def evaluating(model: VisionLanguageModel) -> Iterator[DualEncoder]:
    """The encoders in evaluation mode, where gradients can be had; all is as it was afterwards.

    Weights get none: a layer would multiply matrices for them.
    """
    modes = {module: module.training for module in model.model.modules()}
    learning = [weight for weight in model.model.parameters() if weight.requires_grad]
    model.model.eval().requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield model.model.encoders
    finally:
        for module, training in modes.items():
            module.training = training
        for weight in learning:
            weight.requires_grad_()
