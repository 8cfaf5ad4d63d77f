"""A model of scenes, trained and measured: captions, questions, swaps and heat maps.

    python benchmarks/scenes_run.py            # about 25 minutes

Makes the scenes, trains `configs/scenes.yaml`, and measures on combinations that training never
shows. `--split val` is for tuning: nothing is chosen by the test split. With `--run FOLDER` the
run is kept, and one that is there already is only measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

TASKS = ("caption", "questions", "swap", "explain")
NUM_SCENES = 40_000  # to train on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", default="test_combination", choices=["val", "test_combination"])
    parser.add_argument("--scenes", type=Path, help="made already")
    parser.add_argument("--run", type=Path, help="kept here; measured alone if it is there")
    parser.add_argument("--no-explain", action="store_true", help="leave the slowest task out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scenes_run.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes, trained = args.scenes or folder / "scenes", args.run or folder / "run"
        if args.scenes is None:
            run("data", "scenes", str(scenes), "--num-train", str(NUM_SCENES))
        clock = trained / "seconds_training.json"
        if clock.exists() and (args.set or args.seed):
            parser.error(f"{trained} is trained already: --set and --seed do nothing")
        if not clock.exists():
            began = time.perf_counter()
            words = [f"data.train={scenes}/train-*.tar", f"run.dir={trained}", "eval.suite=null"]
            run("train", "configs/scenes.yaml", *words, f"train.seed={args.seed}", *args.set)
            clock.write_text(json.dumps(time.perf_counter() - began))
        seconds = json.loads(clock.read_text())
        suite, results = folder / "suite.yaml", folder / "results.json"
        tasks = [
            {"task": task, "split": args.split, "data": f"{scenes}/{args.split}-*.tar"}
            | ({"train_data": f"{scenes}/train-*.tar"} if task == "questions" else {})
            for task in TASKS[: -1 if args.no_explain else None]
        ]
        suite.write_text(json.dumps({"tasks": tasks}))  # YAML, too
        run("eval", str(trained), str(suite), "--out", str(results))
        rows = json.loads(results.read_text())
        captions = json.loads((results.parent / "eval" / f"caption-{args.split}.json").read_text())
        named = share_with_both(captions["samples"], objects_of(scenes, args.split))
    result = {
        "split": args.split,
        "seconds_training": seconds,
        "rows": {f"{row['task']}/{row['metric']}": row for row in rows},
        "both_objects_named": named,
        **figures(rows),
    }
    record("scenes_run", result, args.out)


def run(*words: str) -> None:
    print("vlm", *words, flush=True)
    subprocess.run([sys.executable, "-m", "vlm", *words], check=True)


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the bars are about."""
    found = {f"{row['task']}/{row['metric']}": row for row in rows}
    cider, group = found["caption/cider_d"], found["swap/group_score"]
    kinds = [row for name, row in found.items() if name.startswith("questions/accuracy/")]
    relevance = {
        name: found[f"explain/{name}"]["value"]
        for name in ("relevance_in_box", "relevance_in_box_fresh")
        if f"explain/{name}" in found
    }
    return {
        "cider_d_over_constant": cider["value"] / cider["chance"],
        "question_margins": {  # of what a model that doesn't look leaves to be had
            row["metric"]: (row["value"] - row["chance"]) / (1 - row["chance"]) for row in kinds
        },
        "swap_group_low": group["ci95"][0] - group["chance"],
        **relevance,
    }


def objects_of(scenes: Path, split: str) -> dict[str, list[str]]:
    """The objects' names in each scene, by its key."""
    from vlm.data.dataset import open_shards

    dataset = open_shards(f"{scenes}/{split}-*.tar", log=lambda _: None)
    metas = enumerate(dataset.metas())
    return {dataset.key(n): [thing["name"] for thing in meta["objects"]] for n, meta in metas}


def share_with_both(samples: list[dict[str, Any]], objects: dict[str, list[str]]) -> float:
    """Of the scenes with two different objects, those whose caption has both names."""
    chosen = [s for s in samples if len(set(objects[s["key"]])) == 2]
    both = [all(stem(name) in s["generated"] for name in objects[s["key"]]) for s in chosen]
    return sum(both) / len(both)


def stem(name: str) -> str:
    """Also in a plural: "butterfly", "butterflies"."""
    return name[:-1] if name.endswith("y") else name


if __name__ == "__main__":
    main()
