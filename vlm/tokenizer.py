"""Text to token ids and back: CLIP's byte-pair vocabulary, or a small one trained on captions."""

import gzip
import hashlib
import html
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import ftfy
import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from torch import Tensor

from vlm.errors import ConfigError
from vlm.runtime.files import write_synced

CLIP_VOCAB_SIZE = 49408
CLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")  # open_clip's spelling, ids 49406 and 49407
# Two oddities of open_clip's case-insensitive pattern: the long s (U+017F) counts as an s, and a
# lone iota subscript (U+0345), a mark that folds to a letter, is in no class and so is dropped.
CLIP_WORDS = r"'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"

TRAINED_SPECIAL = ("[PAD]", "[SOT]", "[EOT]")  # capitals: cleaned text can never spell them
TRAINED_VOCAB_SIZES = range(len(TRAINED_SPECIAL) + 256, 2**20 + 1)  # every byte has a token


class Tokenizer:
    """Turns texts into rows of ids `SOT .. EOT pad ..`, cleaned as CLIP's are.

    Attributes:
        cleaning: "clip" (repaired, unescaped, single spaces, lower case), or "none" for a file that
            brings a normaliser of its own, which then runs inside the Rust tokenizer.
        context_length: Length L of a row.
        vocab_size: Number of ids, special ones included.
        pad_id: Fills a row after EOT. CLIP's is 0, also the id of a real token ("!").
        sot_id, eot_id: Start and end of text.
    """

    def __init__(self, rust: RustTokenizer, *, context_length: int) -> None:
        """Take over a Rust tokenizer that adds a start and an end token and says how it pads.

        Raises:
            ConfigError: There is no room for one token between SOT and EOT.
        """
        if context_length < 3:
            raise ConfigError(f"context_length ({context_length}) must be at least 3")
        self._rust = rust
        self.cleaning = "clip" if rust.normalizer is None else "none"
        self.context_length = context_length
        self.vocab_size: int = rust.get_vocab_size()
        assert rust.padding is not None
        self.pad_id: int = rust.padding["pad_id"]
        rust.no_padding()
        self.sot_id, self.eot_id = rust.encode("").ids
        rust.enable_truncation(context_length)

    def clean(self, text: str) -> str:
        """The text that is tokenised, and that `caption_id` hashes."""
        if self.cleaning == "clip":
            return clean_text(text)
        return text.encode("utf-8", "replace").decode()  # a lone surrogate becomes "?"

    def encode(self, text: str) -> list[int]:
        """Ids of one text, SOT and EOT included, cut to `context_length` with EOT last."""
        return self._rust.encode(self.clean(text)).ids

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "N L"]:
        """Padded int64 ids, one row a text."""
        batch = [texts] if isinstance(texts, str) else texts
        encodings = self._rust.encode_batch_fast([self.clean(text) for text in batch])
        # Padding here and not in Rust nearly doubles the speed: fewer ids become Python integers.
        rows = np.full((len(batch), self.context_length), self.pad_id, dtype=np.int64)
        for row, encoding in zip(rows, encodings, strict=True):
            row[: len(encoding)] = encoding.ids
        return torch.from_numpy(rows)

    def decode(self, ids: Sequence[int] | Int[Tensor, " L"]) -> str:
        """Readable text of the ids before the first EOT, without special tokens.

        CLIP's vocabulary doesn't say where spaces were: there, words and punctuation come apart.
        """
        ids = [int(i) for i in ids]
        if self.eot_id in ids:
            ids = ids[: ids.index(self.eot_id)]
        return str(self._rust.decode(ids)).strip()

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, each with the places of its tokens in the row of ids.

        Words are what the vocabulary never merges across: letters, digits and punctuation come
        apart. What does not fit into a row is left out.
        """
        clean = self.clean(text)
        encoding = self._rust.encode(clean)
        places: dict[int, list[int]] = {}
        for place, word in enumerate(encoding.word_ids):
            if word is not None:
                places.setdefault(word, []).append(place)
        spans = ([encoding.offsets[place] for place in word] for word in places.values())
        texts = [clean[min(s for s, _ in span) : max(e for _, e in span)].strip() for span in spans]
        return list(zip(texts, places.values(), strict=True))

    def has_vocabulary_of(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids."""
        mine, theirs = (RustTokenizer.from_str(each._rust.to_str()) for each in (self, other))
        for rust in (mine, theirs):
            rust.no_truncation()
        return mine.to_str() == theirs.to_str()

    def to_json(self) -> str:
        """All of it, in the format of the `tokenizers` library."""
        rust = RustTokenizer.from_str(self._rust.to_str())
        pad_token = rust.id_to_token(self.pad_id)
        rust.enable_padding(length=self.context_length, pad_id=self.pad_id, pad_token=pad_token)
        return str(rust.to_str(pretty=True))

    def save(self, path: Path) -> None:
        """Write one `tokenizer.json`: `to_json`."""
        write_synced(path, self.to_json().encode())


def clean_text(text: str) -> str:
    """The text as CLIP sees it: mojibake repaired, HTML unescaped twice, single spaces, lower case.

    Any Unicode comes out encodable: lone surrogates turn into U+FFFD.
    """
    # ftfy has nothing to repair in printable ASCII, and would take most of the time.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def caption_id(clean: str) -> int:
    """A stable signed 64-bit hash of a cleaned caption; by it, equal captions are not negatives."""
    digest = hashlib.blake2b(clean.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def clip_tokenizer(context_length: int = 77) -> Tokenizer:
    """CLIP's tokenizer, from the vocabulary inside the installed open_clip: ids equal open_clip's.

    Two differences are left. Letters newer than Unicode 16 are split as punctuation until the
    `tokenizers` library knows them (open_clip follows its `regex` package). And a text that spells
    out "<start_of_text>" or "<end_of_text>" gets that token everywhere, in open_clip only where no
    punctuation stands right before it.
    """
    merges = _clip_merges()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # bytes in the order of CLIP's ids
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *map("".join, merges), *CLIP_SPECIAL]
    vocab = {token: i for i, token in enumerate(tokens)}
    rust = RustTokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    rust.add_special_tokens(list(CLIP_SPECIAL))
    return _framed(rust, *CLIP_SPECIAL, context_length=context_length)


def train_bpe(texts: Iterable[str], *, vocab_size: int, context_length: int) -> Tokenizer:
    """A byte-level BPE trained on the cleaned texts: pad 0, SOT 1, EOT 2, and no unknown text.

    The same texts in any order give the same file. Fewer ids than asked for come out when the texts
    have no more pairs to merge.

    Raises:
        ConfigError: `vocab_size` is out of range.
    """
    if vocab_size not in TRAINED_VOCAB_SIZES:
        low, high = TRAINED_VOCAB_SIZES[0], TRAINED_VOCAB_SIZES[-1]
        raise ConfigError(f"vocab_size ({vocab_size}) must be between {low} and {high}, as 2048")
    rust = RustTokenizer(models.BPE())
    # A prefixed space, not CLIP's suffix: it decodes to the very text, and the trainer numbers
    # suffixed letters in the order of a randomly seeded hash.
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(TRAINED_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(map(clean_text, texts), trainer)
    return _framed(rust, *TRAINED_SPECIAL[1:], context_length=context_length)


def load_tokenizer(path: Path, *, context_length: int) -> Tokenizer:
    """Read a `tokenizer.json` that adds one start and one end token and has a padding entry.

    What `Tokenizer.save` writes does. A file without a normaliser gets CLIP's cleaning, which is
    how a saved tokenizer remembers it.

    Raises:
        ConfigError: The file is missing, damaged, or from a tokenizer of another kind.
    """
    try:
        rust = RustTokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the bindings raise nothing more precise
        reason = " ".join(str(error).split())
        raise ConfigError(f"tokenizer {path} is damaged or no tokenizer.json: {reason}") from error
    if rust.padding is None or sum(rust.encode("").attention_mask) != 2:
        raise ConfigError(
            f"tokenizer {path} must pad, and add a start and an end token to a text; "
            "`vlm data tokenizer` writes such a file"
        )
    return Tokenizer(rust, context_length=context_length)


def build_tokenizer(
    name: str, *, context_length: int, texts: Callable[[], Iterable[str]] | None = None
) -> Tokenizer:
    """The tokenizer that the setting `model.text.tokenizer` names.

    Args:
        name: "clip", "bpe:SIZE", or the path of a `tokenizer.json`.
        context_length: Length of a row of ids.
        texts: Gives the training captions; called for "bpe:SIZE" only.

    Raises:
        ConfigError: The name means nothing, its file can't be loaded, or there are no captions.
    """
    if name == "clip":
        return clip_tokenizer(context_length)
    if size := re.fullmatch("bpe:([0-9]+)", name):
        if texts is None:
            raise ConfigError(
                f"model.text.tokenizer ({name}) is trained on captions, and there are none here; "
                "give the path of a trained tokenizer.json"
            )
        return train_bpe(texts(), vocab_size=int(size[1]), context_length=context_length)
    if name.endswith(".json") or Path(name).is_file():
        return load_tokenizer(Path(name), context_length=context_length)
    raise ConfigError(
        f"model.text.tokenizer ({name}) must be clip, bpe:SIZE or the path of a tokenizer.json; "
        f"did you mean {_nearest(name)}?"
    )


def _framed(rust: RustTokenizer, sot: str, eot: str, *, context_length: int) -> Tokenizer:
    """Wrap each text in SOT and EOT, and pad with id 0."""
    special = [(token, rust.token_to_id(token)) for token in (sot, eot)]
    rust.post_processor = processors.TemplateProcessing(
        single=f"{sot} $A {eot}", special_tokens=special
    )
    rust.enable_padding(pad_id=0)
    return Tokenizer(rust, context_length=context_length)


def _clip_merges() -> list[tuple[str, str]]:
    """The pairs CLIP merges, first ones first; open_clip itself takes seconds to import."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    num_merges = CLIP_VOCAB_SIZE - 2 * 256 - len(CLIP_SPECIAL)
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : num_merges + 1]
    return [(first, second) for first, second in map(str.split, lines)]


def _nearest(name: str) -> str:
    """The right form that looks most like `name`."""
    inside = Path(name) / "tokenizer.json"
    if inside.is_file():
        return str(inside)
    size = next(iter(re.findall("[0-9]{3,}", name)), "2048")
    return get_close_matches(name.lower(), ["clip", f"bpe:{size}", "tokenizer.json"], 1, 0)[0]
