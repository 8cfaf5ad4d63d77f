from dataclasses import replace

import pytest

from vlm.errors import BadSampleQuotaError, NonFiniteError
from vlm.training.guards import BadSampleGuard, NonFiniteGuard
from vlm.training.step import StepResult

FINE = StepResult({"loss": 1.0}, 1.0, False, 1e-3, 14.0, 8, 0, 0.1, {})
SKIPPED = replace(FINE, skipped=True)


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


def test_bad_samples_end_the_run_beyond_their_share_only():
    guard = BadSampleGuard(0.01)
    guard.check(200, {"image.truncated": 2})
    with pytest.raises(BadSampleQuotaError, match=r"3 of 250 .*=0.01: image.truncated 2, text"):
        guard.check(250, {"text.missing": 1})
