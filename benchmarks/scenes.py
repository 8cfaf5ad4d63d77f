"""How many scenes a second one core composes, encodes and writes, and the digest of their bytes.

    python benchmarks/scenes.py               # about half a minute

Processor time, so that what else the machine does counts little; starting Python and cutting the
objects out is included once, as it is in the command.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scenes.json"))
    args = parser.parse_args()
    found = [compose(args.scenes) for _ in range(args.rounds)]
    for number, (rate, digest) in enumerate(found):
        print(f"{number}: {rate:.0f} scenes/s, {digest[:16]}")
    if len({digest for _, digest in found}) > 1:
        sys.exit("the same seed gave other bytes")
    result = {
        "scenes": args.scenes,
        "scenes_per_core_second": statistics.median(rate for rate, _ in found),
        "sha256": found[0][1],
    }
    record("scenes", result, args.out)


def compose(num_scenes: int) -> tuple[float, str]:
    """Scenes a second of processor time, and the digest of all shards."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "scenes")
        sizes = ["--num-train", str(num_scenes), "--num-heldout", str(num_scenes // 4)]
        before = getrusage(RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "vlm", "data", "scenes", str(out), *sizes]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = getrusage(RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        digest = hashlib.sha256(b"".join(tar.read_bytes() for tar in sorted(out.glob("*.tar"))))
    return (num_scenes + 3 * (num_scenes // 4)) / seconds, digest.hexdigest()


if __name__ == "__main__":
    main()
