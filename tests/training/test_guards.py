import json
from dataclasses import replace

import pytest

from vlm.data.tally import Place, Tally
from vlm.errors import BadSampleQuotaError, NonFiniteError
from vlm.training.guards import BadSampleGuard, Guards, NonFiniteGuard
from vlm.training.step import StepResult

FINE = StepResult({"loss": 1.0}, 1.0, False, 1e-3, 14.0, 8, 0, 99, 0.1, Tally())
SKIPPED = replace(FINE, skipped=True)
PLACE = Place("s-0.tar", "a", 512)


def bad(count, reason="image.truncated"):
    return Tally({reason: count}, {reason: [PLACE]})


def test_three_skipped_steps_in_a_hundred_are_let_pass_and_a_fourth_is_not():
    guard = NonFiniteGuard()
    for step in range(3):
        guard.check(step, SKIPPED)
    with pytest.raises(NonFiniteError) as error:
        guard.check(99, SKIPPED)
    assert error.value.exit_code == 7


def test_old_skips_are_forgotten():
    guard = NonFiniteGuard()
    for step in range(0, 1000, 40):
        guard.check(step, SKIPPED)
    assert guard.num_skipped == 25


def test_a_step_of_bad_samples_alone_is_no_overflow():
    guard = NonFiniteGuard()
    for step in range(10):
        guard.check(step, replace(SKIPPED, num_valid=1))
    assert (guard.num_skipped, guard.recent) == (10, [])


def test_bad_samples_of_whole_epochs_end_the_run_beyond_their_share_exactly():
    guard = BadSampleGuard(0.01, epoch_size=100)
    guard.check(200, bad(2))
    with pytest.raises(BadSampleQuotaError) as error:
        guard.check(300, bad(2, "text.missing"))
    assert error.value.problems == [
        "4 of 300 samples were bad, more than data.max_bad_fraction=0.01 allows; "
        "mend or remove them:",
        "2 image.truncated: s-0.tar: 'a' at byte 512",
        "2 text.missing: s-0.tar: 'a' at byte 512",
    ]


def test_inside_an_epoch_chance_is_allowed_for():
    BadSampleGuard(0.01, epoch_size=10**6).check(1000, bad(22))
    with pytest.raises(BadSampleQuotaError):
        BadSampleGuard(0.01, epoch_size=10**6).check(1000, bad(23))
    with pytest.raises(BadSampleQuotaError):
        BadSampleGuard(0.0, epoch_size=10**6).check(1000, bad(1))


def test_guards_go_on_from_their_state(tmp_path):
    def guards(state):
        return Guards(
            state, folder=tmp_path, max_bad_fraction=0.5, epoch_size=100, global_batch_size=8
        )

    first = guards({})
    assert first.check(1, replace(SKIPPED, bad=bad(3))) == [
        "bad sample: image.truncated: s-0.tar: 'a' at byte 512"
    ]
    second = guards(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert second.counters() == {
        "bad_samples": 3,
        "bad_by_reason": {"image.truncated": 3},
        "skipped_steps": 1,
    }
    assert second.check(2, replace(FINE, bad=bad(1))) == []  # told before
    second.state()
    (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "reason": "image.truncated",
        "count": 4,
        "examples": [{"shard": "s-0.tar", "key": "a", "offset": 512}],
    }
