"""A zero-shot evaluation against a bare forward loop over the same pictures, decoded already.

    python benchmarks/zero_shot_speed.py       # 2,000 pictures, ViT-B/32, on an idle machine

`evaluate` is `vlm.evaluate` of one zero_shot task as a user calls it: it opens the shards, decodes
and resizes the emoji pictures, encodes them and the texts of the classes, scores, resamples.
`forward` encodes the same pictures out of memory, with pages kept, too. `decode` reads them and
encodes nothing. The three run in turns. `ratio` is forward / evaluate, of the same round;
`ratio_without_decoding` is
forward / (evaluate - decode), which is what decoding on cores of its own could reach;
`processor_ratio` is that of the processor's time, which neighbours on the machine change less.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import record
from torch import Tensor
from webdataset import TarWriter

from vlm.config.load import load_config
from vlm.data.dataset import Dataset, open_shards
from vlm.eval.suite import evaluate
from vlm.heads.model import build_model
from vlm.inference import VisionLanguageModel
from vlm.retrieval.embed import read_pictures
from vlm.runtime.device import choose_device, synchronize
from vlm.runtime.heap import pages_kept
from vlm.tokenizer import clip_tokenizer

EMOJI = "datasets/emoji/{val,test}_{artist,concept}-0000.tar"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="clip_vit_b32", help="whose model, with random weights")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--label", default="label", help="label: 708 classes; group: 5")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/zero_shot_speed.json"))
    args = parser.parse_args()
    model = random_model(args.config, args.device)
    with tempfile.TemporaryDirectory() as folder:
        dataset = pictures(Path(folder), args.pictures)
        suite = Path(folder, "suite.yaml")
        suite.write_text(
            f"tasks: [{{task: zero_shot, split: emoji, label: {args.label}, templates: none, "
            f"data: {json.dumps(f'{folder}/*.tar')}}}]"
        )
        seconds, processor, num_classes = measure(model, dataset, suite, args)
    ratios = {
        "processor_ratio": [
            f / e for f, e in zip(processor["forward"], processor["evaluate"], strict=True)
        ],
        "ratio": [f / e for f, e in zip(seconds["forward"], seconds["evaluate"], strict=True)],
        "ratio_without_decoding": [f / (e - d) for f, e, d in zip(*seconds.values(), strict=True)],
    }
    result = {
        "pictures": len(dataset),
        "classes": num_classes,
        "batch_size": args.batch_size,
        "seconds": seconds,
        "processor_seconds": processor,
        "medians": {name: statistics.median(found) for name, found in seconds.items()},
        **{name: statistics.median(found) for name, found in ratios.items()},
    }
    record("zero_shot_speed", result, args.out, device=model.device.type)


def random_model(config: str, device: str) -> VisionLanguageModel:
    settings = load_config(config).model
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(settings.text.context_length)
    network = build_model(settings, tokenizer)
    return VisionLanguageModel(network, settings, tokenizer, choose_device(device))


def pictures(folder: Path, count: int) -> Dataset:
    """`count` emoji pictures as one shard; again from the first where there are fewer."""
    source = open_shards(EMOJI)
    with TarWriter(str(folder / "emoji-0000.tar")) as writer:
        for number in range(count):
            sample = source.read(number % len(source))
            fields = {"json": {**sample.meta, "captions": list(sample.captions)}}
            suffix = source.image_suffix(number % len(source))
            writer.write({"__key__": f"{number:06}", suffix: sample.image, **fields})
    return open_shards(str(folder / "*.tar"))


def measure(
    model: VisionLanguageModel, dataset: Dataset, suite: Path, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Wall and processor seconds of each step in each round, and the number of classes."""

    def read() -> list[Tensor]:
        batches = read_pictures(model, dataset, batch_size=args.batch_size, log=quiet)
        return [batch.images for batch in batches]

    decoded = read()

    def forward() -> None:
        with pages_kept(model.device):
            for images in decoded:
                model.encode_pixels(images)
            synchronize(model.device)

    def whole() -> None:
        evaluate(model, suite, batch_size=args.batch_size, log=quiet)

    model.encode_pixels(decoded[0])  # warm
    seconds: dict[str, list[float]] = {"forward": [], "evaluate": [], "decode": []}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    steps: dict[str, Callable[[], object]] = {"forward": forward, "evaluate": whole, "decode": read}
    for number in range(args.rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            began, worked = time.perf_counter(), time.process_time()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - worked)
            print(number, name, f"{seconds[name][-1]:.2f} s, {processor[name][-1]:.2f} s busy")
    return seconds, processor, len({meta[args.label] for meta in dataset.metas()})


def quiet(line: str) -> None:
    pass


if __name__ == "__main__":
    main()
