"""What a model of scenes says and looks at, drawn: captions, answers, and heat maps.

    python benchmarks/scenes_pictures.py runs/scenes datasets/scenes --out docs/scenes_model.png

The first scenes of each kind in the split, not the best ones. A wrong answer is in red.
"""

import argparse
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import vlm
from vlm.data.dataset import Dataset, open_shards
from vlm.data.decode import decode_image

KINDS = ("relation", "colour", "counts", "corner", "count")
WRONG = "#c5283d"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--split", default="test_combination")
    parser.add_argument("--each", type=int, default=1, help="scenes of each kind")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = vlm.load(args.model)
    dataset = open_shards(f"{args.scenes}/{args.split}-*.tar", log=lambda _: None)
    chosen = first_of_each_kind(dataset, args.each)
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure, rows = plt.subplots(
        len(chosen),
        4,
        figsize=(10, 1.95 * len(chosen)),
        width_ratios=[1, 2.1, 1, 1],
        layout="constrained",
        squeeze=False,
    )
    for axes, number in zip(rows, chosen, strict=True):
        draw(axes, model, dataset, number)
    figure.savefig(args.out, dpi=90)
    print(args.out)


def first_of_each_kind(dataset: Dataset, each: int) -> list[int]:
    """Sample ids."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, meta in enumerate(dataset.metas()):
        if len(found[meta["kind"]]) < each:
            found[meta["kind"]].append(number)
    return [number for kind in KINDS for number in found[kind]]


def draw(axes: list[Axes], model: Any, dataset: Dataset, number: int) -> None:
    """A row: the picture, what is said of it, and where two of its objects are seen."""
    sample = dataset.read(number)
    picture = decode_image(sample.image)
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(picture)
    caption = model.caption([picture])[0]
    lines = [(f'"{caption}"', "black", "bold")]
    asked: dict[str, dict[str, str]] = {}
    for one in sample.meta["qa"]:
        asked.setdefault(one["type"], one)
    for one in [asked[kind] for kind in sorted(asked, key=unusual)[:4]]:
        answer = model.caption([picture], prompt=one["question"])[0]
        colour = "black" if answer == one["answer"] else WRONG
        lines.append((f"{one['question']}  {answer}", colour, "normal"))
    height = 0.98
    for text, colour, weight in lines:
        wrapped = textwrap.wrap(text, 46)
        axes[1].text(0, height, "\n".join(wrapped), color=colour, weight=weight, size=9.5, va="top")
        height -= 0.15 * len(wrapped) + 0.03
    names = list(dict.fromkeys(thing["name"] for thing in sample.meta["objects"]))
    for axis, name in zip(axes[2:], names, strict=False):
        axis.imshow(vlm.explain(model, picture, f"a {name}").overlay(256))
        axis.set_title(name, size=9.5)


def unusual(kind: str) -> int:
    """What few scenes are asked comes first."""
    return ("relation", "colour", "count", "objects", "background", "exists").index(kind)


if __name__ == "__main__":
    main()
