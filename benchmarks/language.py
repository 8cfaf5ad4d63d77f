"""What language modelling does to a small CLIP: its perplexity, and zero-shot either way.

    python benchmarks/language.py            # about 25 minutes on two cores

configs/emoji.yaml without its captioner, at half its length, for each attention of the text encoder
with and without a language head; each with the same seeds. Measured on the validation splits, of
which `val_concept` has concepts that training never shows. Perplexity is compared with what the
token frequencies of the training captions make of the same captions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor

from vlm.data.dataset import Dataset, open_shards
from vlm.tokenizer import build_tokenizer

SPLITS = ("val_artist", "val_concept")
MASKED = ["model.text.attention=bidirectional", "model.text.pool=mean"]
HEAD = ["model.text.language_head=true"]
ARMS = {
    "causal": [],
    "autoregressive": HEAD,
    "bidirectional": MASKED,
    "masked": [*MASKED, *HEAD],
}
PLAIN = {"autoregressive": "causal", "masked": "bidirectional"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=270)
    parser.add_argument("--weight", type=float, default=0.5, help="loss.language_weight")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language.json"))
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        for arm, words in ARMS.items():
            weight = [f"loss.language_weight={args.weight}"] if arm in PLAIN else []
            train = [f"train.seed={seed}", f"train.steps={args.steps}"]
            found[arm].append(measured([*words, *weight, *train]))
            print(arm, seed, json.dumps(found[arm][-1]), flush=True)
    frequencies = {split: perplexity_of_frequencies(split) for split in SPLITS}
    result = {
        "steps": args.steps,
        "weight": args.weight,
        "runs": found,
        "perplexity_of_frequencies": frequencies,
        "perplexity_ratio": {arm: ratios(found[arm], frequencies) for arm in PLAIN},
        "zero_shot_points": {arm: points(found[arm], found[PLAIN[arm]]) for arm in PLAIN},
    }
    record("language", result, args.out)


def measured(words: list[str]) -> dict[str, Any]:
    """Train, and the figures of each split with their chance, by task and split."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite, results = folder / "suite.yaml", folder / "results.json"
        data = {split: f"datasets/emoji/{split}-*.tar" for split in SPLITS}
        zero_shot = {"task": "zero_shot", "label": "label", "templates": "none"}
        tasks = [{**zero_shot, "split": split, "data": data[split]} for split in SPLITS]
        if HEAD[0] in words:
            tasks += [{"task": "perplexity", "split": s, "data": data[s]} for s in SPLITS]
        suite.write_text(json.dumps({"tasks": tasks}))  # YAML, too
        base = ["eval.suite=null", "model.captioner=null", "optim.lr_scale={}"]
        run("train", "configs/emoji.yaml", f"run.dir={folder / 'run'}", *base, *words)
        run("eval", str(folder / "run"), str(suite), "--out", str(results))
        rows = json.loads(results.read_text())
    return {
        f"{row['metric']}/{row['split']}": {"value": row["value"], "chance": row["chance"]}
        for row in rows
        if row["metric"] in ("acc1", "text_perplexity")
    }


def run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "vlm", *words], check=True, stdout=subprocess.DEVNULL)


def perplexity_of_frequencies(split: str) -> float:
    """What each token's share of the training captions makes of a split, once added to each."""
    train, held_out = (
        open_shards(f"datasets/emoji/{name}-*.tar", log=lambda _: None) for name in ("train", split)
    )
    tokenizer = build_tokenizer("bpe:2048", context_length=12, texts=train.captions)

    def tokens(dataset: Dataset) -> Tensor:
        ids = [token for text in dataset.captions() for token in tokenizer.encode(text)[1:]]
        return torch.tensor(ids)

    counts = torch.bincount(tokens(train), minlength=tokenizer.vocab_size) + 1
    surprise = -(counts / counts.sum()).log()
    return float(surprise[tokens(held_out)].mean().exp())


def ratios(runs: list[dict[str, Any]], frequencies: dict[str, float]) -> dict[str, list[float]]:
    """Held-out perplexity as a share of that of the training captions' frequencies, by seed."""
    return {
        split: [one[f"text_perplexity/{split}"]["value"] / frequencies[split] for one in runs]
        for split in SPLITS
    }


def points(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Percentage points of accuracy above the same seed without a head."""
    found = {}
    for split in SPLITS:
        key = f"acc1/{split}"
        each = [100 * (a[key]["value"] - b[key]["value"]) for a, b in zip(runs, plain, strict=True)]
        found[split] = {"seeds": each, "median": statistics.median(each)}
    return found


if __name__ == "__main__":
    main()
