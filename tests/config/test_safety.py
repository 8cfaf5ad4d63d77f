"""Hostile settings files: refused with a line, quickly, with nothing in them run."""

import sys
import time

import pytest
import yaml

from vlm.config.find import read_text
from vlm.errors import ConfigError

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"
MARKER = "touch executed"


def refused(problem: str, line: int = 1) -> list[str]:
    return [f"emoji.yaml:{line}: {problem}"]


@pytest.fixture(scope="session")
def audit_events():
    """The names of audit events of running code, while switched on; a hook can't be removed."""
    watched = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
               "pickle.find_class", "exec", "compile", "import")  # fmt: skip
    events: list[str] = []
    switch = {"on": False}

    def hook(event: str, args: object) -> None:
        if switch["on"] and event in watched:
            events.append(event)

    sys.addaudithook(hook)
    return events, switch


@pytest.mark.parametrize(
    "tag",
    [
        f"!!python/object/apply:os.system ['{MARKER}']",
        "!!python/object/apply:subprocess.run [['touch', 'executed']]",
        f"!!python/object/new:os.system ['{MARKER}']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch executed']",
        "!include /etc/passwd",
        "!!binary aGVsbG8=",
        "! x",
    ],
)
def test_a_tag_is_refused_and_runs_nothing(problems, load, audit_events, tmp_path, tag):
    load("")  # whatever the first call imports
    events, switch = audit_events
    switch["on"] = True
    try:
        lines = problems(f"run:\n  dir: {tag}")
    finally:
        switch["on"] = False
    name = tag.split()[0].replace("!<tag:yaml.org,2002:", "!!").rstrip(">")
    assert lines == refused(
        f"the tag {name} is not allowed; give plain text, numbers, lists and sections", line=2
    )
    assert events == []
    assert not (tmp_path / "executed").exists()


def test_the_audit_hook_would_notice(audit_events, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events, switch = audit_events
    switch["on"] = True
    try:
        yaml.unsafe_load(f"!!python/object/apply:os.system ['{MARKER}']")
    finally:
        switch["on"] = False
    assert "os.system" in events
    events.clear()
    assert (tmp_path / "executed").exists()


NO_ALIASES = "anchors (&) and aliases (*) are not allowed; write the value out, or quote it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, refused(NO_ALIASES)),
        ("run:\n  dir: *x", refused(NO_ALIASES, 2)),
        ("run: {}\ndata: {train: *.tar}", refused(NO_ALIASES, 2)),
        ("a: " + "[" * 500_000, refused("nested deeper than 20 levels")),
        ("a: " + "{a: " * 100_000, refused("nested deeper than 20 levels")),
        ("- " * 100_000, refused("nested deeper than 20 levels")),
        ("".join(f"k{i}: 1\n" for i in range(100_000)),
         refused("more than 1000 values; this is no settings file", 500)),
        ("x" * 2**20 + "x", ["emoji.yaml: larger than 1 MiB; this is no settings file"]),
        ("optim: {lr: 1}\n---\noptim: {lr: 2}",
         refused("not YAML: expected a single document in the stream, but found another document; "
                 "text with special characters needs quotes", 2)),
        ("a: 1\n\tb: 2", refused("not YAML: while scanning for the next token, found character "
                                 "'\\t' that cannot start any token; text with special characters "
                                 "needs quotes", 2)),
        ("run:\n  dir: a: b", refused("not YAML: mapping values are not allowed here; text with "
                                      "special characters needs quotes", 2)),
        ("a: 1\n? [x]\n: 2", refused("a key must be text, not a list or a section", 2)),
        (b"a: 1\nb: \xff", refused("not UTF-8 text; save the file as UTF-8", 2)),
        ("a: 1\nb: \x00", refused("not YAML: the character U+0000", 2)),
        (r'run: {dir: "\ud800"}', refused("half of a surrogate pair is not text")),
        ("optim:\n  lr: 1\n  lr: 2\n",
         refused("duplicate key optim.lr; it is on line 2 already", 3)),
        ("run: {dir: x}\noptim: {}\nrun: {dir: y}",
         refused("duplicate key run; it is on line 1 already", 3)),
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_no_settings_file_is_refused_quickly(problems, text, expected):
    started = time.process_time()
    assert problems(text) == expected
    assert time.process_time() - started < 2


def test_a_thousand_unknown_keys_and_long_names_do_not_stall(problems):
    started = time.process_time()
    lines = problems("".join(f"{'k' * 900}{i}: 1\n" for i in range(400)))
    assert time.process_time() - started < 2
    assert len(lines) == 400
    assert all(len(line) < 200 for line in lines)


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: can't be read: No such file or directory"):
        read_text(tmp_path / "gone.yaml")


def test_a_byte_order_mark_is_no_mistake(load):
    assert load(b"\xef\xbb\xbftrain: {seed: 4}").train.seed == 4
