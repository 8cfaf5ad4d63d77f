"""The tokenizer against open_clip's, its cleaning, its trained sibling, its file, its errors."""
# ruff: noqa: RUF001  # ambiguous characters are what is tested

import argparse
import functools
import io
import multiprocessing
import random
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path

import ftfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from vlm.cli import data_tokenizer
from vlm.errors import ConfigError
from vlm.runtime import torchvision_guard
from vlm.tokenizer import (
    CLIP_WORDS,
    Tokenizer,
    build_tokenizer,
    caption_id,
    clean_text,
    clip_tokenizer,
    load_tokenizer,
    train_bpe,
)

torchvision_guard.install()
from open_clip.tokenizer import SimpleTokenizer, _clean_lower  # noqa: E402  # after the guard

OPEN_CLIP = SimpleTokenizer()
CLIP = clip_tokenizer()

AWKWARD = [
    "",
    " ",
    "!",
    "a photo of a cat",
    "A Photo  of\ta\nCAT.\r\n",
    "it's I'm we've they'd you'll he's don't 'tis rock'n'roll ''s 's's 'ſo",
    "don’t “quote” ‘single’ — dash – … ellipsis",
    "2024-01-31 1234567890 3.14 ½ ² ① Ⅳ ٣ ४ 五",
    "snake_case __init__ a_b _ __ C++ C# #hashtag @user foo.bar@example.com https://a.b/c?d=e&f=g",
    "😀 👩‍👩‍👧‍👦 👍🏽 🇩🇪 🏳️‍🌈 ❤️ ☃️ 1️⃣",
    "é é ñ ñ Å Å a̐éö̲ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
    "שלום עולם مرحبا بالعالم ‏rtl‎ ‫embed‬",
    "你好世界 こんにちは カタカナ ｶﾀｶﾅ 안녕하세요 한글",
    "สวัสดีชาวโลก ภาษาไทย हिन्दी தமிழ் བོད་སྐད ខ្មែរ",
    "nul\0 \x01\x02\x07\x08 \x0b \x0c \x1b[31mred\x1b[0m \x1c \x1d \x1f \x7f \x80 \x85 \x9f",
    "lone \ud800 and \udfff and pair \ud83d\ude00 end",
    "&amp;amp; &amp;lt;b&amp;gt; &lt;b&gt; &nbsp; &#39; &quot; &eacute; &amp;eacute; &no; & AT&T",
    "&#x0; &#128; &#xD800; &#x110000; &#xFB06; &#8217; &amp;#8217; &LT &ampamp;",
    "<b>bold</b> &lt;i&gt; <a href='x'>",
    "schÃ¶n cafÃ© â€œquotedâ€\x9d donâ€™t l’humanitÃ© Ð¿Ñ\x80Ð¸Ð²ÐµÑ\x82",
    "straße STRASSE ẞ ǅ ﬁ ﬂ ﬆ ĳ ŉ ſ",
    "İstanbul ISPARTA ı i̇ ΣΑΣ ΌΔΟΣ ᾳ ᾼ ΐ K Å",
    "Ｆｕｌｌ－ｗｉｄｔｈ　ｔｅｘｔ １２３ ！？",
    "a\u00a0b\u1680c\u2000d\u2003e\u2009f\u2028g\u2029h\u202fi\u205fj\u3000k\u200bl\ufeffm\u180en\u00ado",
    "iota alone \u0345 a\u0345b 1\u03451 !\u0345!",
    "antidisestablishmentarianism " + "x" * 300 + " " + "ab" * 200,
    "!" * 200 + "?!" * 50,
    "word " * 300,
    "😀" * 60,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕥𝕖𝕩𝕥 𝟙𝟚𝟛 Ⓐⓑ ⅷ",
    "\U000e0041 \U0010ffff \ufffd \ufffe \uffff \ue000",
    "</w> a</w> </w",
    "<|endoftext|> <|startoftext|> <|ENDOFTEXT|>a",
    "a <end_of_text> b<start_of_text>c <END_OF_TEXT> <start_of_text><end_of_text> 1<end_of_text>",
    "[PAD] [SOT] [EOT] [UNK] <pad> </s>",
]


def one_line(caught: pytest.ExceptionInfo[ConfigError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_clip_ids_equal_open_clips_on_awkward_text() -> None:
    ours = CLIP(AWKWARD)
    assert ours.dtype == torch.int64
    torch.testing.assert_close(ours, OPEN_CLIP(AWKWARD), rtol=0, atol=0)


@pytest.mark.parametrize("context_length", [3, 8, 256])
def test_clip_truncates_as_open_clip_with_eot_last(context_length: int) -> None:
    ours = clip_tokenizer(context_length)(AWKWARD)
    assert torch.equal(ours, OPEN_CLIP(AWKWARD, context_length=context_length))
    assert ours[AWKWARD.index("word " * 300), -1] == 49407


@functools.cache
def newer_letters() -> set[str]:
    """Every lower-case character that Rust's pattern splits differently from open_clip's."""
    split = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)

    def differs(characters: list[str]) -> bool:  # letters join the a, others the !, digits neither
        text = " ".join(f"a{c}!" for c in characters)
        return [word for word, _ in split.pre_tokenize_str(text)] != OPEN_CLIP.pat.findall(text)

    planes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]  # no others in use
    every = [c for c in map(chr, planes) if c == c.lower()]
    blocks = [every[i : i + 64] for i in range(0, len(every), 64)]
    return {c for block in blocks if differs(block) for c in block if differs([c])}


def test_clip_words_differ_only_for_characters_newer_than_unicode_16() -> None:
    # Oniguruma inside `tokenizers` knows Unicode 16, the `regex` package a later one. Python's own
    # tables are older than both: these characters are unassigned there.
    if int(unicodedata.unidata_version.split(".")[0]) > 16:
        pytest.skip("Python's tables are too new to tell")
    assert {unicodedata.category(c) for c in newer_letters()} <= {"Cn"}


any_text = st.text(st.characters(exclude_categories=()), max_size=60)
mixed_text = st.lists(
    st.one_of(any_text, st.sampled_from(AWKWARD), st.sampled_from(list("&;<>#'_ \t’sſ1aÃ©"))),
    max_size=6,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.one_of(any_text, mixed_text))
def test_clip_ids_equal_open_clips_on_random_unicode(text: str) -> None:
    text = "".join(c for c in text if not newer_letters() & set(c.lower()))
    assert torch.equal(CLIP(text), OPEN_CLIP(text))


def test_a_spelled_special_token_is_that_token_and_other_spellings_are_text() -> None:
    assert CLIP.encode("a <end_of_text>") == [49406, 320, 49407, 49407]
    assert CLIP.encode("<|endoftext|>").count(49407) == 1


def test_special_ids_and_sizes() -> None:
    assert (CLIP.sot_id, CLIP.eot_id, CLIP.pad_id) == (49406, 49407, 0)
    assert (CLIP.vocab_size, CLIP.context_length) == (49408, 77)
    assert CLIP.encode("") == [49406, 49407]
    assert CLIP([]).shape == (0, 77)
    assert CLIP("a cat").shape == (1, 77)


def test_building_clip_does_not_import_open_clip() -> None:
    code = (
        "import sys; from vlm.tokenizer import clip_tokenizer; clip_tokenizer();"
        "sys.exit('open_clip' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.one_of(any_text, mixed_text))
@settings(max_examples=300, deadline=None)
def test_cleaning_equals_open_clips_and_can_be_encoded(text: str) -> None:
    assert clean_text(text) == _clean_lower(text)
    clean_text(text).encode()


def test_cleaning_of_ascii_equals_the_slow_path_for_every_pair_of_characters() -> None:
    ascii_ = [chr(i) for i in range(128)]
    for text in [f"A{first}{second}b" for first in ascii_ for second in ascii_]:
        assert clean_text(text) == _clean_lower(text), ascii(text)


def test_plain_ascii_does_not_go_through_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftfy, "fix_text", None)
    assert clean_text("  A `plain` <b>'caption'</b>, 100% ") == "a `plain` <b>'caption'</b>, 100%"
    with pytest.raises(TypeError):
        clean_text("AT&T")


def test_caption_id_is_stable_signed_64_bits_of_the_clean_text() -> None:
    assert caption_id("a red apple") == 8200019768709763039
    assert caption_id(CLIP.clean(" A  red\napple")) == caption_id("a red apple")
    ids = [caption_id(str(i)) for i in range(1000)]
    assert len(set(ids)) == 1000
    assert min(ids) < 0 < max(ids)
    torch.tensor(ids, dtype=torch.int64)


@pytest.mark.parametrize("text", ["a red apple", "schön, 100% 😀 你好", "it's <b>"])
def test_clip_decodes_to_readable_text(text: str) -> None:
    assert CLIP.decode(CLIP("a red apple")[0]) == "a red apple"
    squeezed = CLIP.decode(CLIP(text)[0]).replace(" ", "")
    assert squeezed == text.replace(" ", "")


def test_decoding_keeps_a_clip_exclamation_mark_whose_id_is_padding() -> None:
    assert CLIP.decode(CLIP.encode("wow !")) == "wow !"
    assert CLIP.decode([]) == ""


CAPTIONS = ["a red apple", "a green apple", "two red cars", "the dog's 2 bones", "grün 😀"] * 4


@pytest.fixture(scope="module")
def spawned() -> Iterator[Pool]:
    """One worker process, started as loader workers are."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(CAPTIONS, vocab_size=290, context_length=512)


def test_trained_bpe_has_the_promised_ids_and_learns_words(trained: Tokenizer) -> None:
    assert (trained.pad_id, trained.sot_id, trained.eot_id) == (0, 1, 2)
    assert trained.vocab_size == 290
    assert trained.encode("") == [1, 2]
    assert len(trained.encode("A RED apple")) == 5
    assert trained("a red apple")[0, 5:].unique().tolist() == [0]


@given(text=st.one_of(any_text, mixed_text))
@settings(max_examples=200, deadline=None)
def test_trained_bpe_decodes_to_the_clean_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    if len(ids) < trained.context_length:
        assert trained.decode(ids) == clean_text(text)
        assert not {0, 1, 2} & set(ids[1:-1])


@pytest.mark.parametrize("kind", ["clip", "trained"])
def test_words_come_with_the_places_of_their_tokens(kind: str, trained: Tokenizer) -> None:
    tokenizer = clip_tokenizer(16) if kind == "clip" else trained
    text = "A  xylophonist's dog, barking"
    words = tokenizer.words(text)
    assert "".join(word for word, _ in words) == "axylophonist'sdog,barking"
    assert [word for word, _ in words][:2] == ["a", "xylophonist"]
    places = [place for _, of_word in words for place in of_word]
    assert places == list(range(1, len(tokenizer.encode(text)) - 1))
    ids = tokenizer.encode(text)
    for word, of_word in words:
        assert tokenizer.decode([ids[place] for place in of_word]).replace(" ", "") == word


def test_words_that_do_not_fit_are_left_out() -> None:
    assert [word for word, _ in clip_tokenizer(4).words("a dog barks")] == ["a", "dog"]


def test_trained_bpe_truncates_with_eot_last() -> None:
    ids = train_bpe(CAPTIONS, vocab_size=300, context_length=4).encode("a red apple, two cars")
    assert len(ids) == 4
    assert ids[-1] == 2


def test_same_captions_give_the_same_file_in_any_order_and_process(
    tmp_path: Path, spawned: Pool
) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgé", k=rng.randint(1, 6))) for _ in range(500)]
    texts = [" ".join(rng.choices(words, k=5)) for _ in range(300)]
    sizes = {"vocab_size": 600, "context_length": 16}
    train_bpe(texts, **sizes).save(tmp_path / "first.json")
    rng.shuffle(texts)
    train_bpe(texts, **sizes).save(tmp_path / "shuffled.json")
    spawned.apply(train_bpe, [texts], sizes).save(tmp_path / "spawned.json")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("kind", ["clip", "bpe:300"])
def test_a_saved_tokenizer_loads_the_same(tmp_path: Path, kind: str) -> None:
    tokenizer = build_tokenizer(kind, context_length=77, texts=lambda: CAPTIONS)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert load_tokenizer(path, context_length=20)(AWKWARD).shape == (len(AWKWARD), 20)
    again = build_tokenizer(str(path), context_length=77)
    assert torch.equal(again(AWKWARD), tokenizer(AWKWARD))
    assert {**vars(again), "_rust": 0} == {**vars(tokenizer), "_rust": 0}
    assert again.decode(again.encode("A red apple")) == "a red apple"
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_file_with_its_own_normaliser_is_not_cleaned(tmp_path: Path, trained: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    rust = RustTokenizer.from_file(str(path))
    rust.normalizer = normalizers.NFC()
    rust.save(str(path))
    loaded = load_tokenizer(path, context_length=99)
    assert loaded.decode(loaded.encode("A  &amp; B")) == "A  &amp; B"
    assert loaded.clean("\ud800") == "?"


def test_a_spawned_worker_gets_the_tokenizer(
    capfd: pytest.CaptureFixture[str], spawned: Pool, trained: Tokenizer
) -> None:
    trained(CAPTIONS)  # starts Rust's threads, which the library warns of in a forked process
    assert spawned.map(trained.encode, CAPTIONS) == [trained.encode(text) for text in CAPTIONS]
    assert capfd.readouterr().err == ""


def _damaged(path: Path, kind: str) -> None:
    train_bpe(CAPTIONS, vocab_size=300, context_length=9).save(path)
    whole = path.read_bytes()
    if kind == "directory":
        path.unlink()
        path.mkdir()
    elif kind == "missing":
        path.unlink()
    elif kind == "unframed":
        RustTokenizer(models.BPE()).save(str(path))
    else:
        damaged = {"truncated": whole[:-100], "empty": b"", "binary": b"\xff\xfe\0", "json": b"{}"}
        path.write_bytes(damaged[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "No such file"),
        ("directory", "Is a directory"),
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("binary", "damaged"),
        ("json", "damaged"),
        ("unframed", "start and an end token"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_clear_line(
    tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    _damaged(path, kind)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(path, context_length=9)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CLIP", "did you mean clip?"),
        ("clpi", "did you mean clip?"),
        ("bpe", "did you mean bpe:2048?"),
        ("bpe:4k", "did you mean bpe:2048?"),
        ("BPE-4096", "did you mean bpe:4096?"),
        ("tokenizer.jsn", "did you mean tokenizer.json?"),
        ("bpe:100", "between 259 "),
        ("bpe:99999999999999999999", "between 259 "),
    ],
)
def test_a_wrong_name_says_the_nearest_right_form(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(name, context_length=77, texts=lambda: CAPTIONS)
    assert hint in one_line(caught)


def test_a_folder_is_answered_with_the_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="did you mean") as caught:
        build_tokenizer(str(tmp_path), context_length=77)
    assert str(tmp_path / "tokenizer.json") in one_line(caught)


def test_training_without_captions_is_refused() -> None:
    with pytest.raises(ConfigError, match="none here"):
        build_tokenizer("bpe:300", context_length=77)


def test_a_row_needs_room_for_a_token() -> None:
    with pytest.raises(ConfigError, match="at least 3"):
        clip_tokenizer(2)


def write_shard(path: Path, captions: list[str]) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "png")
    with tarfile.open(path, "w") as shard:
        for i, caption in enumerate(captions):
            for suffix, content in (("png", picture.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def run_verb(*words: str) -> int:
    parser = argparse.ArgumentParser()
    data_tokenizer.add_arguments(parser)
    return data_tokenizer.run(parser.parse_args(words))


def test_the_verb_trains_on_a_shards_captions_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "train-0000.tar", CAPTIONS)
    out = tmp_path / "tokenizer.json"
    words = [str(tmp_path / "train-*.tar"), "--vocab-size", "290", "--out", str(out)]
    assert run_verb(*words) == 0
    tokenizer = load_tokenizer(out, context_length=77)
    mean = sum(len(tokenizer.encode(text)) for text in CAPTIONS) / len(CAPTIONS)
    printed = capsys.readouterr().out
    assert f"290 ids from {len(CAPTIONS)} captions; tokens a caption: mean {mean:.1f}" in printed
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        run_verb(*words)
    assert out.read_bytes() == before
