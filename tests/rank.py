"""One rank of a command, forked with everything imported; conftest.py sets the upper-case names."""

import os
import sys
import warnings

import torch

from vlm.cli.main import main

if __name__ == "__main__":  # loader workers import this file, under another name
    for descriptor in (1, 2):
        os.dup2(os.open(LOG, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)  # noqa: F821
    os.environ.update(ENVIRONMENT)  # noqa: F821
    torch.set_num_threads(1)
    if "train.compile=always" not in WORDS:  # noqa: F821  # torch.compile warns of itself
        warnings.simplefilter("error")
        os.environ["PYTHONWARNINGS"] = "error"  # of loader workers
    sys.exit(main(WORDS))  # noqa: F821
