"""The quickstart recipe, three seeds: accuracy on the validation splits, and training time.

    python benchmarks/demo.py

Only validation splits are scored here; the test splits are scored by `make demo` alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo.json"))
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        runs.append(train(seed))
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    names = runs[0]["scores"]
    result = {
        "seconds_training": [run["seconds_training"] for run in runs],
        "median": {name: statistics.median(run["scores"][name] for run in runs) for name in names},
        "chance": runs[0]["chance"],
        "runs": runs,
    }
    record("demo", result, args.out)


def train(seed: int) -> dict[str, Any]:
    """One run of the shipped recipe, as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "emoji", f"run.dir={folder}/run", f"train.seed={seed}"]
        subprocess.run([sys.executable, "-m", "vlm", *words], check=True, stdout=sys.stderr)
        results = json.loads(Path(folder, "run/results.json").read_text())
        last = Path(folder, "run/metrics.jsonl").read_text().splitlines()[-1]
    name = "{task}/{split}/{metric}"
    return {
        "seconds_training": json.loads(last)["time_s"],
        "scores": {name.format(**row): row["value"] for row in results},
        "chance": {name.format(**row): row["chance"] for row in results},
    }


if __name__ == "__main__":
    main()
