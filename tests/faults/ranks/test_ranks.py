"""D1, D2: one rank dies, raises or stops; the other ends soon, and says which one it was."""

import signal
import time

import pytest

SHORT_S, LONG = 3, 5


def times(short):
    """The short count always; the rest of the long count in the long form."""
    return [
        pytest.param(n, marks=[] if n < short else [pytest.mark.long], id=str(n))
        for n in range(LONG)
    ]


@pytest.mark.parametrize("number", times(1))
@pytest.mark.parametrize(
    ("fault", "codes", "lines"),
    [
        ("kill", [6, -signal.SIGKILL], {0: "rank 1 died; rank 0 was at step 5, computing"}),
        pytest.param(
            "leave",
            [6, 9],
            {0: "rank 1 died; rank 0 was at step 5, computing"},
            marks=pytest.mark.long,
        ),
        ("fail", [6, 1], {0: "rank 1 failed, with exit code 1; its own line says why"}),
        (
            "damage",
            [6, 3],
            {
                0: "rank 1 failed, with exit code 3; its own line says why",
                1: "s-0.tar: is damaged on this rank",
            },
        ),
    ],
)
def test_a_rank_that_ends_ends_the_other(start, record, number, fault, codes, lines):
    ranks = start(faults=[(fault, 5, 1)])
    ranks.wait(ranks=[1])
    began = time.monotonic()
    assert ranks.wait(timeout_s=15) == codes
    took_s = time.monotonic() - began
    said = ranks.errors()
    assert said.keys() == lines.keys()
    for rank, line in lines.items():
        assert said[rank].startswith(f"error: {line}")
    assert took_s < 5
    record("D1", fault, 1, f"rank 0: exit 6 after {took_s:.1f} s")


@pytest.mark.parametrize("number", times(1))
@pytest.mark.parametrize("fault", ["stop", pytest.param("sleep", marks=pytest.mark.long)])
def test_a_rank_that_is_silent_ends_the_other(start, record, number, fault):
    ranks = start(f"run.rank_timeout_s={SHORT_S}", faults=[(fault, 5, 1)])
    ranks.until("step  4/12")
    began = time.monotonic()
    assert ranks.wait(timeout_s=30, ranks=[0]) == [6]
    took_s = time.monotonic() - began
    assert ranks.errors()[0].startswith("error: rank 1 gave no answer in time (run.rank_timeout_s)")
    assert SHORT_S - 0.5 < took_s < SHORT_S + 5
    assert ranks.alive() == [1]  # torchrun ends it
    record("D2", f"{fault}, rank_timeout_s={SHORT_S}", 1, f"rank 0: exit 6 after {took_s:.1f} s")


@pytest.mark.long
def test_the_rank_that_keeps_the_store_may_be_the_silent_one(start):
    ranks = start(f"run.rank_timeout_s={SHORT_S}", faults=[("stop", 5, 0)])
    assert ranks.wait(timeout_s=40, ranks=[1]) == [6]
    assert "rank 0 gave no answer in time" in ranks.errors()[1]


def test_an_error_that_all_ranks_have_is_said_once(start):
    ranks = start("train.global_batch_size=15")
    assert ranks.wait() == [2, 2]
    assert len(ranks.errors()) == 1
