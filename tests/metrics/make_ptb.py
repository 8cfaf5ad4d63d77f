"""Writes ptb.json: captions, and their tokens by pycocoevalcap's own tokeniser, which needs Java.

    python tests/metrics/make_ptb.py

A neutral caption follows each one, for Stanford's program may look at what comes next.
"""

import json
import os
import random
import tarfile
from pathlib import Path

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

HERE = Path(__file__).parent
NUM_EMOJI = 600
CARRIERS = ("a photo of {} on a table", "The sign says {}.", "A dog, {} and two cats")


def emoji_captions() -> list[str]:
    captions: dict[str, None] = {}
    for path in sorted((HERE / "../../datasets/emoji").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    meta = json.load(tar.extractfile(member))
                    captions |= dict.fromkeys(meta["captions"])
    return sorted(random.Random(0).sample(sorted(captions), NUM_EMOJI))


def odd_captions() -> list[str]:
    """The sentences of odd_captions.txt; its fragments, each alone and inside of a sentence."""
    text = (HERE / "odd_captions.txt").read_text(encoding="utf-8")
    sentences, fragments = text.split("\n\n")
    captions = dict.fromkeys(sentences.split("\n"))
    for number, fragment in enumerate(fragments.split()):
        captions[fragment] = None
        captions[CARRIERS[number % 3].format(fragment)] = None
    return list(captions)


def main() -> None:
    os.environ["JAVA_TOOL_OPTIONS"] = "-Dfile.encoding=UTF-8"  # pycocoevalcap writes UTF-8
    captions = [*emoji_captions(), *odd_captions()]
    asked = {f"{i}{kind}": [{"caption": text}] for i, c in enumerate(captions)
             for kind, text in (("", c), ("x", "x"))}  # fmt: skip
    answers = PTBTokenizer().tokenize(asked)
    assert all(answers[f"{i}x"] == ["x"] for i in range(len(captions)))
    tokens = [" ".join(answers[str(i)][0].split()) for i in range(len(captions))]
    text = json.dumps({"captions": captions, "tokens": tokens}, ensure_ascii=False, indent=0)
    (HERE / "ptb.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(captions)} captions, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
