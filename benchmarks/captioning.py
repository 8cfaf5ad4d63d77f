"""Captions by CoCa's head: open_clip's `coca_ViT-B-32` in parity, and what the cache brings.

    python benchmarks/captioning.py            # about 5 minutes, 6 GiB

open_clip's model with random weights (its output projection, which it leaves uninitialised, is
drawn first) and ours with the same: next-token logits, and greedy captions against a loop over
open_clip's forward. Then texts of 64 tokens, greedily and with four beams, with the cache and
without, in turns.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlm.config.load import load_config
from vlm.heads.captioner import Growing
from vlm.heads.coca import Coca, CocaDecoder
from vlm.heads.generate import Decoding, generate
from vlm.heads.model import VisionLanguageModule, build_model
from vlm.hub.open_clip import translate
from vlm.models.transformer import KeysValues
from vlm.runtime import torchvision_guard
from vlm.tokenizer import clip_tokenizer

torchvision_guard.install()
import open_clip  # behind the guard
from record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/captioning.json"))
    args = parser.parse_args()
    theirs, ours = models()
    parity = compare(theirs, ours)
    print("parity", parity, flush=True)
    decoder = ours.decoder()
    assert isinstance(decoder, CocaDecoder)
    with torch.inference_mode():
        image_tokens = ours.encoders.image.tokens(torch.randn(args.batch, 3, 224, 224))
    searches = {"greedy": Decoding(), "beams": Decoding(num_beams=4)}
    taken: dict[str, dict[str, list[float]]] = {}
    same = True
    for name, decoding in searches.items():
        sides = {"cached": decoder, "uncached": Uncached(decoder)}
        taken[name] = {side: [] for side in sides}
        for number in range(args.rounds):
            texts = {}
            for side in list(sides)[:: -1 if number % 2 else 1]:
                began = time.perf_counter()
                texts[side] = written(sides[side], image_tokens, decoding, args.length)
                taken[name][side].append(time.perf_counter() - began)
                print(name, number, side, round(taken[name][side][-1], 2), flush=True)
            same &= texts["cached"].equal(texts["uncached"])
    medians = {
        name: {side: statistics.median(times) for side, times in sides.items()}
        for name, sides in taken.items()
    }
    result = {
        "tokens": args.length,
        "parity": parity,
        "seconds": medians,
        "same_tokens": same,
        "speedup": {name: m["uncached"] / m["cached"] for name, m in medians.items()},
    }
    record("captioning", result, args.out, "open_clip_torch")


def models() -> tuple[torch.nn.Module, VisionLanguageModule]:
    """open_clip's, drawn so that picture and text decide what follows; and ours of its weights."""
    torch.manual_seed(0)
    theirs = open_clip.create_model("coca_ViT-B-32", precision="fp32", device="cpu")
    for name, parameter in theirs.text_decoder.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            if "cross_attn" in name and "out_proj" in name:
                parameter.data.mul_(5)
    config = load_config("coca_vit_b32", {"data.train": "unused.tar"})
    ours = build_model(config.model, clip_tokenizer(76))
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs.eval(), ours.eval()


@torch.inference_mode()
def compare(theirs: torch.nn.Module, ours: VisionLanguageModule) -> dict[str, float | bool]:
    """The largest difference of logits, and whether greedy captions are equal."""
    pixels, tokens = torch.randn(4, 3, 224, 224), torch.randint(1, 49406, (4, 20))
    expected = theirs(pixels, tokens)["logits"]
    image_tokens = ours.encoders.image.tokens(pixels)
    assert isinstance(ours.captioner, Coca)
    states = ours.encoders.text(tokens)[1][:, :-1]
    logits = ours.captioner(image_tokens, states) @ ours.captioner.vocabulary.T
    found = written(ours.decoder(), image_tokens, Decoding(), 20)
    texts = found[:, :1]
    while texts.shape[1] < found.shape[1]:
        following = theirs(pixels, texts, output_labels=False)["logits"][:, -1:].argmax(-1)
        texts = torch.cat([texts, following], dim=1)
    return {
        "logits": float((logits - expected).abs().max() / expected.abs().max()),
        "greedy_equal": texts.equal(found),
        "different_captions": len(found.unique(dim=0)),
    }


def written(
    decoder: "CocaDecoder | Uncached", image_tokens: Tensor, decoding: Decoding, length: int
) -> Tensor:
    tokenizer = clip_tokenizer(76)
    prompt = torch.full((len(image_tokens), 1), tokenizer.sot_id)
    # no end: all texts are as long
    return generate(decoder, image_tokens, prompt, decoding, eot_id=0, max_length=length)


class Uncached:
    """The decoder computing everything at every token; the texts so far lie in `past`."""

    def __init__(self, decoder: CocaDecoder) -> None:
        self.decoder = decoder

    def begin(self, image_tokens: Tensor) -> Growing:
        """Keep the pictures."""
        return Growing([KeysValues(image_tokens, image_tokens)])

    def extend(self, texts: Growing, tokens: Tensor) -> tuple[Tensor, Growing]:
        """Compute the whole texts again."""
        if texts.past:
            tokens = torch.cat([texts.past[0].keys, tokens], dim=1)
        head = self.decoder.head
        hidden = head(texts.images[0].keys, self.decoder.text(tokens)[1])
        return hidden[:, -1] @ head.vocabulary.T, replace(texts, past=[KeysValues(tokens, tokens)])


if __name__ == "__main__":
    main()
