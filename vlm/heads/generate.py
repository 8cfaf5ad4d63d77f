"""Texts written token by token: greedily, by beam search, or drawn from the nucleus."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.errors import ConfigError
from vlm.heads.captioner import Growing


@runtime_checkable  # for the tests, which check every argument's type
class Decoder(Protocol):
    """What writes: `vlm.heads.captioner.Captioner`, or `vlm.heads.coca.CocaDecoder`."""

    def begin(self, image_tokens: Float[Tensor, "B N W"]) -> Growing:
        """Texts about pictures, before their first token."""
        ...

    def extend(
        self, texts: Growing, tokens: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B V"], Growing]:
        """Logits of what follows the texts with these tokens."""
        ...


@dataclass(frozen=True)
class Decoding:
    """How a text is chosen; the default is greedy.

    Attributes:
        num_beams: Texts that are followed at a time (Sutskever et al., arXiv 1409.3215, section
            3.2); 1: the likeliest token at each step.
        length_penalty: Beams that have ended compare by log p / length ** length_penalty: 0 favours
            short texts, more than 1 long ones.
        no_repeat_ngram: No sequence of so many tokens occurs twice in a text; 0: any may.
        top_p: Draw from the likeliest tokens that together have this probability (nucleus sampling,
            arXiv 1904.09751, section 3.1); None: no drawing.
        temperature: Of drawing.
        seed: Of drawing.
        max_length: Of a text in tokens, prompt included; None: what the model can.

    Raises:
        ConfigError: A value is out of range, or beams are to be drawn.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    top_p: float | None = None
    temperature: float = 1.0
    seed: int = 0
    max_length: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "num_beams must be at least 1": self.num_beams >= 1,
            "no_repeat_ngram must be at least 0": self.no_repeat_ngram >= 0,
            "top_p must be in 0..1, and not 0": self.top_p is None or 0 < self.top_p <= 1,
            "temperature must be greater than 0": self.temperature > 0,
            "max_length must be at least 2": self.max_length is None or self.max_length >= 2,
            "top_p draws and num_beams searches: give one": self.top_p is None
            or self.num_beams == 1,
        }
        if problems := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(problems)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    image_tokens: Float[Tensor, "B N W"],
    prompt: Int[Tensor, "B P"],
    decoding: Decoding,
    *,
    eot_id: int,
    max_length: int,
) -> Int[Tensor, "B T"]:
    """A text for each picture, from its prompt on to the end-of-text token or `max_length`.

    Args:
        decoder: What writes.
        image_tokens: What it reads.
        prompt: How each text begins: at least the start-of-text token.
        decoding: How tokens are chosen.
        eot_id: Ends a text; what follows it is filled with it.
        max_length: Of the result, prompt included.
    """
    num, beams = len(prompt), decoding.num_beams
    logits, texts = decoder.extend(decoder.begin(image_tokens), prompt)
    found = _Found(num, max_length, eot_id, decoding.length_penalty, prompt.device)
    texts, tokens = texts.repeated(beams), prompt.repeat_interleave(beams, 0)
    # one beam at the start: all are equal
    scores = torch.full((num, beams), -torch.inf, device=prompt.device)
    scores[:, 0] = 0.0
    logits = logits.repeat_interleave(beams, 0)
    ended = torch.zeros(num * beams, dtype=torch.bool, device=prompt.device)
    while tokens.shape[1] < max_length and not ended.all():
        logp = _log_probabilities(logits, tokens, ended, decoding, eot_id)
        if decoding.top_p is not None:
            following = _drawn(logp, decoding, tokens.shape[1])
            rows = torch.arange(num, device=tokens.device)
            scores += logp.gather(1, following[:, None])
        else:
            scores, rows, following = _best(scores, logp)
        tokens = torch.cat([tokens[rows], following[:, None]], dim=1)
        was_ended = ended[rows]
        ended = following == eot_id
        found.take(tokens, scores.flatten(), ended & ~was_ended)
        if tokens.shape[1] < max_length and not ended.all():
            logits, texts = decoder.extend(texts.chosen(rows), following[:, None])
    found.take(tokens, scores.flatten(), ~ended)
    return found.best()


class _Found:
    """The best text of each picture among those that have ended."""

    def __init__(
        self, num: int, max_length: int, eot_id: int, length_penalty: float, device: torch.device
    ) -> None:
        self.tokens = torch.full((num, max_length), eot_id, device=device)
        self.scores = torch.full((num,), -torch.inf, device=device)
        self.lengths = torch.zeros(num, dtype=torch.long, device=device)
        self.length_penalty = length_penalty
        self.eot_id = eot_id

    def take(self, tokens: Tensor, scores: Tensor, which: Bool[Tensor, " R"]) -> None:
        """Texts that end here; there are as many rows a picture as beams."""
        num, length = len(self.scores), tokens.shape[1]
        scores = torch.where(which, scores / length**self.length_penalty, -torch.inf)
        best, beam = scores.view(num, -1).max(dim=1)
        better = best > self.scores
        rows = torch.arange(num, device=tokens.device) * (len(tokens) // num) + beam
        self.scores = torch.where(better, best, self.scores)
        self.lengths[better] = length
        self.tokens[better, :length] = tokens[rows[better]]
        self.tokens[better, length:] = self.eot_id

    def best(self) -> Int[Tensor, "B T"]:
        """As long as the longest."""
        return self.tokens[:, : int(self.lengths.max())]


def _log_probabilities(
    logits: Float[Tensor, "R V"],
    tokens: Int[Tensor, "R T"],
    ended: Bool[Tensor, " R"],
    decoding: Decoding,
    eot_id: int,
) -> Float[Tensor, "R V"]:
    """Of the next token; a text that has ended goes on with its end, for sure."""
    logits = logits.float()
    if decoding.no_repeat_ngram:
        logits = logits.masked_fill(_repeats(tokens, decoding.no_repeat_ngram, logits), -torch.inf)
    logp = logits.log_softmax(dim=1)
    logp[ended] = -torch.inf
    logp[ended, eot_id] = 0.0
    return logp


def _repeats(tokens: Int[Tensor, "R T"], size: int, like: Float[Tensor, "R V"]) -> Tensor:
    """[R, V]: the tokens that would make the last `size` ones an n-gram that is there already."""
    banned = torch.zeros_like(like, dtype=torch.bool)
    if tokens.shape[1] < size:
        return banned
    grams = tokens.unfold(1, size, 1)  # [R, T - size + 1, size]
    last = tokens[:, tokens.shape[1] - size + 1 :]
    same = (grams[..., :-1] == last[:, None]).all(dim=2)
    rows, places = same.nonzero(as_tuple=True)
    banned[rows, grams[rows, places, -1]] = True
    return banned


def _best(
    scores: Float[Tensor, "B K"], logp: Float[Tensor, "R V"]
) -> tuple[Float[Tensor, "B K"], Int[Tensor, " R"], Int[Tensor, " R"]]:
    """The K likeliest continuations of each picture's K texts: scores, whose, and with what."""
    num, beams = scores.shape
    vocab_size = logp.shape[1]
    candidates = (scores[:, :, None] + logp.view(num, beams, vocab_size)).flatten(1)
    scores, places = candidates.topk(beams, dim=1)
    first = torch.arange(num, device=scores.device)[:, None] * beams
    return scores, (first + places // vocab_size).flatten(), (places % vocab_size).flatten()


def _drawn(logp: Float[Tensor, "B V"], decoding: Decoding, step: int) -> Int[Tensor, " B"]:
    """A token of each nucleus; row r's number follows from (seed, step, r) alone."""
    assert decoding.top_p is not None
    ordered, order = (logp / decoding.temperature).softmax(dim=1).sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered
    nucleus = torch.where(before < decoding.top_p, ordered, 0.0).cumsum(dim=1)
    numbers = np.random.default_rng([decoding.seed, step]).random(len(logp), dtype=np.float32)
    drawn = torch.from_numpy(numbers).to(logp.device)[:, None] * nucleus[:, -1:]
    place = (nucleus <= drawn).sum(dim=1, keepdim=True).clamp(max=logp.shape[1] - 1)
    return order.gather(1, place)[:, 0]
