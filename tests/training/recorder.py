"""`vlm` with a ledger: each rank appends the sample ids of every step it takes to $LEDGER/N-RANK.

Run as a script by test_elastic.py, in the place of `python -m vlm`.
"""

import json
import os
import sys
from pathlib import Path

from vlm.cli.main import main
from vlm.training.step import TrainStep

ledger = Path(os.environ["LEDGER"])
take_step = TrainStep.__call__


def recorded(self, step, batch):
    result = take_step(self, step, batch)
    with ledger.open("a") as file:
        file.write(json.dumps([step, batch.sample_ids.tolist()]) + "\n")
    return result


if __name__ == "__main__":
    TrainStep.__call__ = recorded
    sys.exit(main())
