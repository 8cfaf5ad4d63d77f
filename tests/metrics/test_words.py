import pytest

from vlm.metrics.words import exact_match, token_f1, words


def test_words_split_at_punctuation_and_fold_case():
    assert words("A T-Rex, eating: “Straße”!") == ["a", "t", "rex", "eating", "strasse"]
    assert words("हिन्दी शब्द") == ["हिन्दी", "शब्द"]  # combining marks do not split
    assert words(" ,. ") == []


def test_token_f1_counts_repeated_words_once_each():
    # common: red, red (the reference has two of the three); 2 * 2 / (4 + 3)
    assert token_f1("red red red car", ["Red, red bus"]) == pytest.approx(4 / 7)


def test_token_f1_takes_the_best_reference():
    assert token_f1("a red car", ["blue bus", "red car"]) == pytest.approx(4 / 5)
    assert token_f1("cat", ["dog"]) == 0.0
    assert token_f1("", ["..."]) == 1.0
    assert token_f1("", ["dog"]) == 0.0


def test_token_f1_without_references_is_an_error():
    with pytest.raises(ValueError, match="reference"):
        token_f1("cat", [])


def test_exact_match_needs_all_words_in_order():
    assert exact_match("Red car.", ["bus", "red car"])
    assert not exact_match("car red", ["red car"])
