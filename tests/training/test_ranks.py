import sys

import pytest

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_two_ranks_have_the_losses_of_one(start, metrics, tmp_path):
    """fp32, no dropout, and no Muon, which iterates in bf16: only the order of sums differs."""
    common = ("train.steps=20", "optim.name=adamw")
    launchers = {
        "one": (sys.executable, "-m", "vlm"),
        "two": (*TORCHRUN, "-m", "vlm"),
        "two, in parts": (*TORCHRUN, "-m", "vlm"),
    }
    runs = {}
    for name, launcher in launchers.items():
        parts = ("train.micro_batch_size=3",) if "parts" in name else ()
        process = start(*common, *parts, f"run.dir={tmp_path}/{name}", launcher=launcher)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        runs[name] = metrics(tmp_path / name)
    for one, *others in zip(*runs.values(), strict=True):
        for term in ("loss/contrastive", "loss/caption", "grad_norm"):
            for two in others:
                assert two[term] == pytest.approx(one[term], rel=1e-5, abs=1e-5), one["step"]
