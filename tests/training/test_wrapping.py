"""FSDP2, compiled and checkpointed blocks, caching and averaging: alone and together, one run."""

import pytest
import torch

from vlm.checkpoint import load_newest

COMMON = (
    "train.steps=8",
    "optim.name=adamw",
    "optim.warmup_steps=2",
    "loss.caption_every=5",  # so that some micro-batches have no caption
)


def same(ours, theirs):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        for term in ("loss/contrastive", "loss/caption", "grad_norm", "logit_scale"):
            assert one[term] == pytest.approx(two[term], rel=1e-5, abs=1e-5), one["step"]


def cases(words_by_name):
    """A test for each; to compile blocks needs a compiler."""
    compiler = pytest.mark.system("g++")
    params = [
        pytest.param(words, id=name, marks=[compiler] if "train.compile=always" in words else [])
        for name, words in words_by_name.items()
    ]
    return pytest.mark.parametrize("words", params)


@pytest.fixture(scope="module")
def plain(start, metrics, tmp_path_factory):
    """One rank, nothing wrapped."""
    folder = tmp_path_factory.mktemp("plain")
    start(*COMMON, f"run.dir={folder}").finish()
    return folder, metrics(folder)


ONE_RANK = {
    "checkpointed": ["train.checkpoint_activations=true"],
    "checkpointed, cached": ["train.checkpoint_activations=true", "train.micro_batch_size=6"],
    "compiled": ["train.compile=always"],
    "compiled, checkpointed, cached": [
        "train.compile=always",
        "train.checkpoint_activations=true",
        "train.micro_batch_size=8",
    ],
}


@cases(ONE_RANK)
def test_one_rank_has_the_same_losses(start, metrics, plain, tmp_path, words):
    start(*COMMON, *words, f"run.dir={tmp_path}").finish()
    same(metrics(tmp_path), plain[1])


TWO_RANKS = {
    "fsdp": ["train.strategy=fsdp"],
    "fsdp, checkpointed, cached": [
        "train.strategy=fsdp",
        "train.checkpoint_activations=true",
        "train.micro_batch_size=3",
    ],
    "ddp, checkpointed, cached": [
        "train.checkpoint_activations=true",
        "train.micro_batch_size=3",
    ],
    "ddp, compiled, cached": ["train.compile=always", "train.micro_batch_size=4"],
    "fsdp, compiled, cached": [
        "train.strategy=fsdp",
        "train.compile=always",
        "train.micro_batch_size=4",
    ],
}


@cases(TWO_RANKS)
def test_two_ranks_have_the_same_losses_and_weights(start, metrics, plain, tmp_path, words):
    start(*COMMON, *words, f"run.dir={tmp_path}", world_size=2).finish()
    same(metrics(tmp_path), plain[1])
    ours, theirs = (load_newest(run / "checkpoints").groups for run in (tmp_path, plain[0]))
    for group, tensors in theirs.items():
        assert ours[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours[group][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_in_bf16_all_of_it_is_about_the_same(start, metrics, tmp_path):
    together = ("strategy=fsdp", "checkpoint_activations=true", "micro_batch_size=3")
    for name, words in (("one", ()), ("two", [f"train.{word}" for word in together])):
        size = 2 if words else 1
        words = (*COMMON, "train.precision=bf16", *words, f"run.dir={tmp_path / name}")
        start(*words, world_size=size).finish()
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for term in ("loss/contrastive", "loss/caption"):
            assert one[term] == pytest.approx(two[term], rel=1e-2), one["step"]


def test_what_fsdp_saved_goes_on_in_one_process_and_back(start, metrics, plain, tmp_path):
    """Four steps on two ranks, two on one, two on two ranks."""
    folder = tmp_path / "run"
    for steps, world_size in ((4, 2), (6, 1), (8, 2)):
        words = (f"train.steps={steps}", *COMMON[1:], "optim.schedule=constant")
        more = ("train.strategy=fsdp", f"run.dir={folder}", "--resume", "auto")
        start(*words, *more, world_size=world_size).finish()
    start(*COMMON, "optim.schedule=constant", f"run.dir={tmp_path / 'one'}").finish()
    same(metrics(folder), metrics(tmp_path / "one"))
