import pytest

from vlm.report.html import Html, clean, element, join, shorten


def test_text_is_escaped_and_markup_is_not():
    inner = element("b", "<i>")
    assert element("p", "a & ", inner) == "<p>a &amp; <b>&lt;i&gt;</b></p>"
    assert isinstance(join("<"), Html)


def test_an_attribute_cannot_be_left():
    assert element("p", title="\"'><script>") == ('<p title="&quot;&#x27;&gt;&lt;script&gt;"></p>')


def test_attributes_by_value():
    html = element("details", class_="a", aria_label="b", open=True, hidden=False, id=None)
    assert html == '<details class="a" aria-label="b" open></details>'
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


@pytest.mark.parametrize("char", "\x00\x07\x1b\x7f\x85\u202e\u202b\u2066\u2069\u200f\u061c\ud800")
def test_characters_that_harm_are_removed(char):
    assert clean(f"a{char}b") == "ab"
    assert element("p", f"a{char}b", title=f"c{char}") == '<p title="c">ab</p>'


def test_joiners_and_line_breaks_stay():
    family, conjunct = "\U0001f469\u200d\U0001f467", "\u0915\u094d\u200c\u0937"
    assert clean(f"{family} {conjunct}\n\tb") == f"{family} {conjunct}\n\tb"


def test_shorten_keeps_one_line():
    assert shorten("a\n b") == "a b"
    assert shorten("word " * 10, 12) == "word word w…"
