import pytest

from vlm.metrics.words import exact_match, token_f1, words


def test_words_split_at_punctuation_and_fold_case():
    assert words("A T-Rex, eating: “Straße”!") == ["a", "t", "rex", "eating", "strasse"]
    assert words("हिन्दी शब्द") == ["हिन्दी", "शब्द"]  # combining marks do not split
    assert words(" ,. ") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只红色的猫。", "一 只 红 色 的 猫"),
        ("𠮷𠮷野家で、ラーメン。", "𠮷 𠮷 野 家 で ラ ー メ ン"),
        ("ｶﾞﾗｽの々々", "ガ ラ ス の 々 々"),  # half width; marks of repetition
        ("か゚き", "か゚ き"),  # a mark that no composed character has
        ("ที่นี่น้ำ", "ที่ นี่ น้ํ า"),
        ("ຢູ່ນີ້", "ຢູ່ ນີ້"),
        ("ខ្មែរ", "ខ្ មែ រ"),
        ("မြန်မာ", "မြ န် မာ"),
        ("2024年T恤衫 a猫b", "2024 年 t 恤 衫 a 猫 b"),
        ("猫\ufe0f犬", "猫\ufe0f 犬"),
        ("빨간 고양이", "빨간 고양이"),
        ("กa\u0301b", "ก áb"),
    ],
)
def test_scripts_without_spaces_split_into_characters(text, expected):
    assert words(text) == expected.split()


def test_captions_without_spaces_agree_in_part():
    assert token_f1("一只狗", ["一只猫"]) == pytest.approx(2 / 3)
    assert exact_match("赤い 車。", ["赤い車"])


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
