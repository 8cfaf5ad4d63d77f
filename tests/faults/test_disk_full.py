"""F: a disk that is full, fails or may not be written costs no checkpoint that was there."""

import random
import re
import shutil
from collections import Counter

import pytest

from vlm import checkpoint

ERRORS = {  # system call -> what it may answer
    "mkdir": ("ENOSPC", "EROFS"),
    "openat": ("ENOSPC", "EIO"),
    "write": ("ENOSPC", "EIO", "EDQUOT"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("ENOSPC", "EROFS"),
    "statfs": ("EIO",),
    "read": ("EIO",),
    "unlinkat": ("EIO",),
}


@pytest.fixture
def injections(traced, fork, tmp_path):
    """(system call, its number in the saving thread, error) of a third save's calls."""
    folder = tmp_path / "calls"
    assert fork("save", folder=str(folder), first=1, last=2).wait()[0] == 0
    trace = "trace=" + ",".join(ERRORS)
    code, out, log = traced("save", "-e", trace, folder=str(folder), first=3, last=3)
    assert code == 0, out
    lines = [match for line in log.splitlines() if (match := re.match(r"(\d+) +(\w+)\(.*", line))]
    saver = next(match[1] for match in lines if match[2] == "fsync")
    counts, cases = Counter(), []
    for match in lines:
        if match[1] == saver:
            counts[match[2]] += 1
            # not Python's own files, nor a mkdir of what is there already
            if str(folder) in match[0] and "EEXIST" not in match[0]:
                cases += [(match[2], counts[match[2]], error) for error in ERRORS[match[2]]]
    assert {name for name, _, _ in cases} == set(ERRORS)
    return trace, cases


@pytest.mark.system("strace")
@pytest.mark.parametrize("chosen", [10, pytest.param(None, marks=pytest.mark.long)])
def test_a_failing_system_call_is_exit_74_and_costs_nothing(
    injections, traced, fork, tmp_path, record, chosen
):
    trace, cases = injections
    outcomes = Counter()
    for name, when, error in random.Random(1).sample(cases, chosen) if chosen else cases:
        folder = tmp_path / f"{name}-{when}-{error}"
        assert fork("save", folder=str(folder), first=1, last=2).wait()[0] == 0
        inject = f"inject={name}:error={error}:when={when}"
        code, out, log = traced("save", "-e", trace, "-e", inject, folder=str(folder),
                                first=3, last=3)  # fmt: skip
        assert "(INJECTED)" in log, inject
        assert code == 74, (inject, code, out)
        assert out.startswith("error: "), (inject, out)
        assert out.count("\n") == 1, (inject, out)
        if error in ("ENOSPC", "EDQUOT") and name == "write":
            assert re.search(r"disk full: need \d+\.\d MiB, have \d+\.\d MiB", out), out
        loaded = checkpoint.load_newest(folder)
        assert loaded.state["step"] in (2, 3)
        assert not loaded.skipped, (inject, loaded.skipped)
        outcomes[loaded.state["step"]] += 1
        assert fork("save", folder=str(folder), first=3, last=4).wait()[0] == 0
        assert checkpoint.load_newest(folder).state["step"] == 4
        assert len(list(folder.iterdir())) == 2, "leftovers"
        shutil.rmtree(folder)
    record(
        "F",
        f"{', '.join(sorted({error for errors in ERRORS.values() for error in errors}))} "
        "from a system call of a save",
        outcomes.total(),
        f"exit 74; the older loads {outcomes[2]}, the newer {outcomes[3]}; the next save works",
    )


@pytest.mark.system("unshare")
def test_a_full_disk_ends_the_run_after_three_tries_and_it_resumes(
    fork_on_small_disks, config, tmp_path, record
):
    fork, seen, disks = fork_on_small_disks
    whole, full = tmp_path / "whole", seen / "full"
    args = {"config": str(config), "overrides": [f"run.dir={whole}"]}
    assert fork("run", **args).wait()[0] == 0
    size = sum(
        f.stat().st_size for f in checkpoint.list_checkpoints(whole / "checkpoints")[0].iterdir()
    )
    shutil.rmtree(full / "probe")
    (full / "ballast").write_bytes(bytes(4 * 2**20 - int(2.8 * size)))  # room for two, not three
    args = {"config": str(config), "overrides": [f"run.dir={disks}/full/run"]}
    code, out = fork("run", **args).wait()
    assert code == 74, out
    assert out.count("older checkpoints are intact") == 2, out
    assert re.search(r"error: .*disk full: need \d\.\d MiB, have \d\.\d MiB\n$", out), out
    steps = [checkpoint.verify(p) for p in checkpoint.list_checkpoints(full / "run/checkpoints")]
    assert steps == [None, None]
    (full / "ballast").unlink()
    code, out = fork("run", **args).wait()
    assert code == 0, out
    assert "resuming" in out
    model = "model/model.safetensors"
    assert (full / "run" / model).read_bytes() == (whole / model).read_bytes()
    record("F", "a disk of 4 MiB that fills up", 1,
           "2 warnings with need and have, exit 74 at the third, 2 checkpoints intact; "
           "with room made, resumes to equal bits")  # fmt: skip


@pytest.mark.system("unshare")
def test_a_disk_without_inodes_is_a_full_disk(fork_on_small_disks, config, record):
    fork, seen, disks = fork_on_small_disks
    args = {"config": str(config), "overrides": [f"run.dir={disks}/inodes/run"]}
    code, out = fork("run", **args).wait()
    assert code == 74, out
    assert re.search(r"disk full: need \d+ inodes \(files\), have \d\n", out), out
    folder = seen / "inodes/run/checkpoints"
    assert {checkpoint.verify(path) for path in checkpoint.list_checkpoints(folder)} == {None}
    record("F", "a disk without inodes left", 1, "exit 74, checkpoint intact")


@pytest.mark.system("unshare")
def test_a_read_only_folder_is_one_line(fork_on_small_disks, config, record):
    fork, _, disks = fork_on_small_disks
    args = {"config": str(config), "overrides": [f"run.dir={disks}/readonly/run"]}
    code, out = fork("run", **args).wait()
    assert code == 74, out
    assert out.endswith("readonly/run/config.yaml: cannot write: Read-only file system\n"), out
    record("F", "a read-only file system", 1, "exit 74 before the first step")
