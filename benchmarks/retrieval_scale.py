"""Retrieval of a million texts among 25,000 pictures, both directions: its memory and its time.

    python benchmarks/retrieval_scale.py        # 5 minutes on two cores, 4 GiB

From captions and features to rows with intervals, as the `retrieval` task does it. Features are
noise around their pictures. Memory is the peak of resident pages beyond the captions and features.
Some ranks are compared with those of fp64 products, made one query at a time.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor
from torch.nn.functional import normalize

from vlm.eval.retrieval import Captions, number_captions, ranks_of, retrieval_rows
from vlm.runtime.heap import peak_resident_bytes, resident_bytes
from vlm.tokenizer import clip_tokenizer

NUM_CHECKED = 200  # queries a direction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=25_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--equal-captions", choices=("merge", "keep"), default="merge")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/retrieval_scale.json"))
    args = parser.parse_args()
    of_pictures, tokenizer = captions(args.texts, args.pictures), clip_tokenizer()
    images, texts = features(of_pictures, args.texts, args.dim)
    warm_up(args.dim)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, seconds, began = resident_bytes(), {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name], began = now - began, now
        mib = (peak_resident_bytes() - before) / 2**20
        print(f"{name}: {seconds[name]:.1f} s, peak {mib:.0f} MiB", flush=True)

    found = number_captions(of_pictures, tokenizer, args.equal_captions)
    lap("captions")
    ranks = ranks_of(texts, images, found.pairs, device=torch.device(args.device))
    lap("ranks")
    rows = retrieval_rows(*ranks, found.pairs, range(args.pictures))
    lap("rows")
    mib = (peak_resident_bytes() - before) / 2**20
    result = {
        "texts": len(texts),
        "pictures": len(images),
        "dim": args.dim,
        "features_gib": (texts.nbytes + images.nbytes) / 2**30,
        "gib": mib / 1024,
        "seconds": seconds | {"all": sum(seconds.values())},
        "figures": {row.metric: row.value for row in rows},
        "ranks_unlike_fp64": unlike(texts, images, found, ranks),
        "checked": 2 * NUM_CHECKED,
    }
    record("retrieval_scale", result, args.out, device=args.device)


def captions(num_texts: int, num_pictures: int) -> list[list[str]]:
    """Each picture's captions, all different."""
    names = [f"a photograph of the thing numbered {number}" for number in range(num_texts)]
    return [names[picture::num_pictures] for picture in range(num_pictures)]


def features(of_pictures: list[list[str]], num_texts: int, dim: int) -> tuple[Tensor, Tensor]:
    """Pictures, and texts near theirs, in the order in which they are numbered."""
    torch.manual_seed(0)
    images = normalize(torch.randn(len(of_pictures), dim), dim=1)
    counts = torch.tensor([len(texts) for texts in of_pictures])
    owners = torch.arange(len(of_pictures)).repeat_interleave(counts)
    texts = torch.empty(num_texts, dim)
    for start in range(0, num_texts, 8192):
        chunk = slice(start, start + 8192)
        texts[chunk] = 0.2 * images[owners[chunk]] + torch.randn(len(owners[chunk]), dim) / dim**0.5
        texts[chunk] = normalize(texts[chunk], dim=1)
    return images, texts


def warm_up(dim: int) -> None:
    """Loads what the libraries load at first."""
    few = torch.randn(600, dim)
    found = Captions(["a"] * 600, torch.arange(600).expand(2, -1))
    ranks = ranks_of(few, few, found.pairs, device=torch.device("cpu"))
    retrieval_rows(*ranks, found.pairs, range(600))


def unlike(texts: Tensor, images: Tensor, found: Captions, ranks: tuple[Tensor, Tensor]) -> int:
    """How many of some ranks are not those of fp64: only where two scores are equal in fp32."""
    count = 0
    sides: list[Any] = [
        (texts, images, found.pairs, ranks[0]),
        (images, texts, found.pairs.flip(0), ranks[1]),
    ]
    for queries, targets, pairs, of_queries in sides:
        for query in range(0, len(queries), -(-len(queries) // NUM_CHECKED)):
            right = pairs[1][pairs[0] == query]
            scores = torch.cat(
                [part.double() @ queries[query].double() for part in targets.split(8192)]
            )
            best = scores[right].max()
            scores[right] = -torch.inf
            count += int((scores >= best).sum()) != int(of_queries[query])
    return count


if __name__ == "__main__":
    main()
