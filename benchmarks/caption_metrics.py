"""Seconds that caption metrics take: 5,000 pictures with 5 references, each of 7 to 14 words.

    python benchmarks/caption_metrics.py       # about 2 minutes

Made-up words whose frequencies follow Zipf's law. CIDEr-D includes its document frequencies; "best"
is the search for the constant caption that sets the chance level.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

from record import record

from vlm.eval import constant_captions as constants
from vlm.metrics.bleu import bleu_counts
from vlm.metrics.cider import CiderD
from vlm.metrics.ptb import tokenize
from vlm.metrics.rouge import rouge_l


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/caption_metrics.json"))
    args = parser.parse_args()
    words = [f"w{number}" for number in range(8000)]
    weights = [1 / (number + 1) for number in range(8000)]
    draw = random.Random(0).choices
    lengths = range(7, 15)

    def caption() -> list[str]:
        return draw(words, weights, k=draw(lengths)[0])

    references = [[caption() for _ in range(5)] for _ in range(args.pictures)]
    candidates = [caption() for _ in references]
    pairs = list(zip(candidates, references, strict=True))
    texts = [[" ".join(tokens) for tokens in of_picture] for of_picture in references]
    corpus = CiderD(references)
    choices = constants.candidates_of(texts, references)
    timed = {
        "tokens": lambda: [tokenize(text) for of_picture in texts for text in of_picture],
        "cider_d": lambda: CiderD(references).scores(candidates),
        "bleu": lambda: [bleu_counts(*pair) for pair in pairs],
        "rouge_l": lambda: [rouge_l(*pair) for pair in pairs],
        "best_cider_d": lambda: constants.best_cider_d(choices, corpus),
        "best_bleu": lambda: constants.best_bleu(choices, references),
        "best_rouge_l": lambda: constants.best_rouge_l(choices, references),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(args.rounds):
        for name, run in timed.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
            print(number, name, f"{seconds[name][-1]:.2f} s", flush=True)
    result = {
        "pictures": args.pictures,
        "median": {name: statistics.median(found) for name, found in seconds.items()},
    }
    record("caption_metrics", result, args.out)


if __name__ == "__main__":
    main()
