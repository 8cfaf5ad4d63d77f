import math
import re

import pytest

from vlm.report import chart


def curve(steps, values, **settings):
    return chart.Curve("Loss", "nats", chart.pool(steps, values), **settings)


def polylines(svg):
    found = re.findall(r'class="line" points="([^"]*)"', svg)
    return [[tuple(map(float, p.split(","))) for p in points.split()] for points in found]


def test_a_curve_goes_through_its_values():
    svg = chart.draw(curve([0.0, 50.0, 100.0], [0.0, 1.0, 0.5], from_zero=True))
    (points,) = polylines(svg)
    assert [x for x, _ in points] == pytest.approx(
        [46, 46 + 262 / 1.04 / 2, 46 + 262 / 1.04], abs=0.1
    )
    heights = [chart.BOTTOM - y for _, y in points]
    assert heights == pytest.approx([0, 124 / 1.04, 62 / 1.04], abs=0.1)


def test_a_value_that_is_not_finite_breaks_the_line():
    svg = chart.draw(curve([1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 2.0, math.nan, 2.0, 1.0]))
    assert [len(points) for points in polylines(svg)] == [2, 2]
    assert "nan" not in svg


def test_many_values_are_pooled_between_the_first_and_the_last():
    steps = [float(step) for step in range(10_000)]
    points = chart.pool(steps, [step % 2 for step in steps])
    assert len(points) <= chart.MAX_POINTS + 2
    assert (points[0].mean, points[-1].mean, points[-1].step) == (0, 1, 9999)
    assert (points[5].low, points[5].high) == (0, 1)
    assert points[5].mean == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_short_runs_keep_every_value(num):
    points = chart.pool([float(step) for step in range(num)], [1.0] * num)
    assert [point.step for point in points] == list(range(num))


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("value", [0.0, 5.0, -1e-9])
def test_a_constant_can_be_drawn(value, from_zero):
    svg = chart.draw(curve([1.0], [value], from_zero=from_zero))
    assert "nan" not in svg
    assert "circle" in svg


def test_a_curve_says_what_it_shows():
    svg = chart.draw(curve([1.0, 2000.0], [6.91, 1.5], reference=(math.log(1024), "ln 1,024")))
    assert 'aria-label="Loss in nats: 6.91 at step 1, 1.5 at step 2,000"' in svg
    assert "ln 1,024" in svg


def test_a_bar_shows_value_interval_and_chance():
    svg = chart.bar("acc1", 0.5, (0.4, 0.6), 0.1)
    assert 'class="fill" x="0" y="5" width="75.0"' in svg
    assert 'class="interval" x1="60.0" y1="8" x2="90.0"' in svg
    assert 'class="chance" x1="15.0"' in svg
    assert 'aria-label="50.0%, between 40.0% and 60.0%; chance 10.0%"' in svg
