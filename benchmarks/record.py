"""What a benchmark found, with what it ran on: into a file, and as one line of JSON."""

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

STARTED = time.strftime("%Y-%m-%d %H:%M")


def record(
    benchmark: str, figures: dict[str, Any], out: Path, *packages: str, device: str = "cpu"
) -> None:
    """Write a result.

    Args:
        benchmark: Its name.
        figures: What it found.
        out: The file.
        packages: Whose versions matter, too, by their names in the registry.
        device: What computed.
    """
    import torch  # not before: some benchmarks look at the memory that they take without it

    import vlm
    from vlm.runtime.device import machine

    result = {
        "benchmark": benchmark,
        "command": " ".join(sys.argv),
        "started": STARTED,
        "machine": machine(torch.device(device)),
        "versions": {
            "python": platform.python_version(),
            "vlm": vlm.__version__,
            "torch": torch.__version__,
            **{package: version(package) for package in packages},
        },
        **figures,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
