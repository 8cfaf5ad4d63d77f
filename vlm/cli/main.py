"""The `vlm` command: imports the chosen verb alone, and turns errors into lines and exit codes."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from vlm.errors import ConfigError, Outcome, Preempted


class Verb(NamedTuple):
    """A verb in the overview: its group, what it does, and the arguments of an example."""

    group: str
    help: str
    example: str


# "data pack" is vlm/cli/data_pack.py: HELP, add_arguments(parser), run(args) -> exit code
VERBS = {
    "train": Verb("Train", "train a model as a config says", "clip_vit_b32 data.train=photos.csv"),
    "checkpoint list": Verb("Train", "list a run's checkpoints", "runs/emoji"),
    "checkpoint verify": Verb("Train", "read a run's checkpoints byte by byte", "runs/emoji"),
    "eval": Verb("Measure", "score a model on the tasks of a suite", "runs/emoji suite.yaml"),
    "compare": Verb("Measure", "set runs side by side, tested", "runs/emoji runs/other"),
    "report": Verb("Measure", "write a run's HTML report", "runs/emoji"),
    "classify": Verb("Use", "name what pictures show", "runs/emoji photos/ --labels cat,dog"),
    "caption": Verb("Use", "describe pictures", "runs/emoji photos/"),
    "explain": Verb("Use", "show why they match", 'runs/emoji cat.png "a cat" --out overlay.png'),
    "index": Verb("Use", "embed pictures into a searchable folder", "runs/emoji photos/ index/"),
    "search": Verb("Use", "find pictures by text or by picture", 'index/ "a red bird"'),
    "data pack": Verb("Data", "write a folder or a table as shards", "photos.csv shards/"),
    "data index": Verb("Data", "index shards and count bad samples", '"shards/*.tar"'),
    "data check": Verb("Data", "read and compare every byte", '"shards/*.tar" --decode'),
    "data stats": Verb("Data", "measure pictures and captions", '"shards/*.tar" --out stats.png'),
    "data show": Verb("Data", "draw a sheet of samples", '"shards/*.tar" --out sheet.png'),
    "data dedup": Verb("Data", "find pictures that repeat", '"shards/*.tar" --out sheet.png'),
    "data scenes": Verb("Data", "compose scenes with captions and questions", "datasets/scenes"),
    "data tokenizer": Verb("Data", "train a tokenizer on captions", '"shards/*.tar"'),
}

EPILOG = """\
CONFIG  a YAML file, or the name of a shipped config; key=value changes a setting: optim.lr=1e-3
DATA    a shard pattern in quotes ("shards/*.tar", "shards/{0000..0003}.tar"), a folder of images,
        or a table: CSV, TSV, JSONL or Parquet with a column of images and a column of captions
MODEL   a run folder (runs/emoji) or a model folder (runs/emoji/model)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; problems go to stderr, one line each.

    Set VLM_DEBUG=1 to see where a problem was raised. An exception that is no `Outcome` is our
    own bug: it passes through with its traceback.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a closed pipe shows here, not when Python ends
    except Outcome as error:
        return _report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports SIGPIPE
    return code


def _report(error: Outcome) -> int:
    if os.environ.get("VLM_DEBUG") == "1":
        traceback.print_exception(error)
    prefix = "" if isinstance(error, Preempted) else "error: "
    for problem in error.problems:
        print(f"{prefix}{_printable(problem)}", file=sys.stderr)
    return error.exit_code


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _run(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    first = words[0] if words else ""
    if first in ("--version", "-V"):
        import vlm

        print(f"vlm {vlm.__version__}")
        return 0
    if first in ("", "-h", "--help"):
        return _overview(list(VERBS), asked=bool(first))
    members = [verb for verb in VERBS if verb.startswith(f"{first} ")]
    if not members:
        return _run_verb(first, words[1:])
    if words[1:2] in ([], ["-h"], ["--help"]):
        return _overview(members, asked=bool(words[1:]))
    return _run_verb(" ".join(words[:2]), words[2:])


def _run_verb(verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(_unknown(verb))
    module = importlib.import_module(f"vlm.cli.{verb.replace(' ', '_')}")
    parser = _Parser(
        prog=f"vlm {verb}",
        description=module.HELP,
        epilog=f"example:\n  vlm {verb} {VERBS[verb].example}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    try:  # intermixed: options may stand between key=value words
        args = parser.parse_intermixed_args(words)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    return int(module.run(args))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _unknown(verb: str) -> str:
    import difflib

    kind = "option" if verb.startswith("-") else "verb"
    near = difflib.get_close_matches(verb, VERBS, n=1)
    return f"unknown {kind} {verb}; " + (f"did you mean {near[0]}?" if near else "see vlm --help")


def _overview(verbs: Sequence[str], *, asked: bool) -> int:
    """Prints what there is: to stdout when asked, else to stderr as the answer to no verb."""
    lines = ["usage: vlm VERB ...    (vlm VERB --help explains one; vlm --version)"]
    group = ""
    for verb in verbs:
        if VERBS[verb].group != group:
            group = VERBS[verb].group
            lines += ["", group]
        lines += [f"  {verb:<19}{VERBS[verb].help}", f"{'':21}vlm {verb} {VERBS[verb].example}"]
    print("\n".join([*lines, "", EPILOG]), end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
