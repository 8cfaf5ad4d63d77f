"""One measured process of benchmarks/loader.py: prints the samples/s of one pipeline as JSON.

    python benchmarks/loader_run.py vlm|normalized|open_clip|decode SHARDS --workers 1

`normalized` is `vlm` with the pixels made floats on the CPU, as open_clip's workers do; a GPU does
that in no time that shows. `decode` is libjpeg-turbo alone, whole pictures, in this process.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

BATCH_SIZE, IMAGE_SIZE, SKIPPED_BATCHES = 64, 224, 4
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", choices=PIPELINES)
    parser.add_argument("shards", help="pattern with a brace range")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True, help="in the shards")
    args = parser.parse_args()
    batches = PIPELINES[args.pipeline](args.shards, args.workers, args.samples)
    for _ in islice(batches, SKIPPED_BATCHES):
        pass
    begun = time.perf_counter()
    num_samples = sum(islice(batches, args.samples // BATCH_SIZE - SKIPPED_BATCHES))
    print(json.dumps({"samples_per_s": num_samples / (time.perf_counter() - begun)}))


def vlm_batches(shards: str, workers: int, _: int) -> Iterator[int]:
    return (len(batch.images) for batch in _vlm_batches(shards, workers))


def normalized_batches(shards: str, workers: int, _: int) -> Iterator[int]:
    import torch

    from vlm.data.transforms import normalize

    torch.set_num_threads(1)
    return (len(normalize(b.images, MEAN, STD)) for b in _vlm_batches(shards, workers))


def _vlm_batches(shards: str, workers: int) -> Iterator[Any]:
    from vlm.data.dataset import open_shards
    from vlm.data.loader import training_batches
    from vlm.data.order import SampleOrder
    from vlm.data.transforms import TrainTransform
    from vlm.tokenizer import clip_tokenizer

    dataset = open_shards(shards)
    return training_batches(
        dataset,
        SampleOrder(dataset.shard_sizes, seed=0, streams=1, global_batch_size=BATCH_SIZE),
        transform=TrainTransform(IMAGE_SIZE),  # open_clip's crop: 0.9 to 1 of the area
        tokenizer=clip_tokenizer(),
        seed=0,
        micro_batch_size=BATCH_SIZE,
        num_workers=workers,
    )


def open_clip_batches(shards: str, workers: int, samples: int) -> Iterator[int]:
    from vlm.runtime import torchvision_guard

    torchvision_guard.install()
    from open_clip import get_tokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    settings = SimpleNamespace(
        train_data=shards,
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        batch_size=BATCH_SIZE,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = image_transform(IMAGE_SIZE, is_train=True, mean=MEAN, std=STD)
    tokenizer = get_tokenizer("ViT-B-32")
    data = get_wds_dataset(settings, transform, is_train=True, tokenizer=tokenizer)
    return (len(images) for images, _ in data.dataloader)


def decode_batches(shards: str, _: int, samples: int) -> Iterator[int]:
    import cv2
    import numpy as np

    from vlm.data.dataset import open_shards

    cv2.setNumThreads(1)
    dataset = open_shards(shards)
    pictures = [np.frombuffer(dataset.read(i).image, np.uint8) for i in range(samples)]
    for first in range(0, samples, BATCH_SIZE):
        for picture in pictures[first : first + BATCH_SIZE]:
            assert cv2.imdecode(picture, cv2.IMREAD_COLOR) is not None
        yield BATCH_SIZE


PIPELINES = {
    "vlm": vlm_batches,
    "normalized": normalized_batches,
    "open_clip": open_clip_batches,
    "decode": decode_batches,
}

if __name__ == "__main__":
    main()
