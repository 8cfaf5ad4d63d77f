import pytest

from vlm.report import numbers


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.4123, "41.2%"), (0.0, "0.0%"), (1.0, "100.0%"), (0.00034, "0.034%"), (3e-9, "0.0%")],
)
def test_percent(share, text):
    assert numbers.percent(share) == text


def test_a_rank_is_no_percentage():
    assert numbers.metric("text_to_image_median_rank", 278.0) == "278.0"
    assert numbers.metric("acc1", 0.5) == "50.0%"
    assert numbers.metric("cider_d", 1.1374) == "1.137"
    assert numbers.metric("length", 9.26) == "9.3"


def test_metrics_have_the_field_s_names():
    names = [numbers.metric_name(n) for n in ("bleu_4", "cider_d", "clip_score", "token_f1")]
    assert names == ["BLEU-4", "CIDEr-D", "CLIPScore", "token f1"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (59.6, "1 min"), (125.0, "2 min 5 s"), (3600.0, "1 h"), (90_000.0, "1 d 1 h")],
)
def test_duration(seconds, text):
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.0, 2080.0, [0, 1000, 2000]),
        (-3.0, 3.0, [-2, 0, 2]),
        (0.0, 1e-3, [0, 0.00025, 0.0005, 0.00075, 0.001]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert numbers.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0005, "0.0005"), (1500.0, "1.5k"), (2e6, "2M"), (0.3, "0.3")]
)
def test_tick_labels_are_short(value, text):
    assert numbers.tick_label(value) == text


def test_listed():
    assert numbers.listed(["a"]) == "a"
    assert numbers.listed(["a", "b", "c"]) == "a, b and c"
