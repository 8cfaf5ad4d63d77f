import pytest


def test_two_ranks_have_the_losses_of_one(start, metrics, tmp_path):
    """fp32, no dropout, and no Muon, which iterates in bf16: only the order of sums differs."""
    common = ("train.steps=20", "optim.name=adamw")
    runs = {}
    for name, world_size in {"one": 1, "two": 2, "two, in parts": 2}.items():
        parts = ("train.micro_batch_size=3",) if "parts" in name else ()
        start(*common, *parts, f"run.dir={tmp_path}/{name}", world_size=world_size).finish()
        runs[name] = metrics(tmp_path / name)
    for one, *others in zip(*runs.values(), strict=True):
        for term in ("loss/contrastive", "loss/caption", "grad_norm"):
            for two in others:
                assert two[term] == pytest.approx(one[term], rel=1e-5, abs=1e-5), one["step"]
