"""One rank of `vlm train` that notes the sample ids of every step it takes; run by test_elastic.py.

Its globals are given to it: WORDS of the command, ENVIRONMENT of the rank, and LOG, a file, beside
which the ledger lies.
"""

import json
import os
import sys

import torch

from vlm.cli.main import main
from vlm.training.step import TrainStep

take_step = TrainStep.__call__


def recorded(self, step, batch, **options):
    result = take_step(self, step, batch, **options)
    with open(f"{LOG}.ledger", "a") as file:  # noqa: F821
        file.write(json.dumps([step, batch.sample_ids.tolist()]) + "\n")
    return result


sys.stdout = sys.stderr = open(LOG, "w", buffering=1)  # noqa: F821, SIM115
os.environ.update(ENVIRONMENT)  # noqa: F821
torch.set_num_threads(1)
TrainStep.__call__ = recorded
sys.exit(main(WORDS))  # noqa: F821
