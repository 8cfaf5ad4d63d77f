"""docs/from_open_clip.md: every flag of open_clip's trainer once, no key that is not there."""

import ast
import json
import math
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import vlm
from vlm.cli.main import VERBS
from vlm.config.find import read_yaml
from vlm.config.load import load_config
from vlm.config.schema import Config
from vlm.config.sections import fields_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/from_open_clip.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
SPANS = re.findall(r"`([^`]+)`", PROSE)
ROWS = [line.split(" | ") for line in PROSE.splitlines() if line.startswith("| `")]


def installed(package, path):
    """A file of an installed package, which is not imported: that would take seconds."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / path


def flags_of_open_clip():
    calls = ast.walk(ast.parse(installed("open_clip_train", "params.py").read_text()))
    return [
        argument.value
        for call in calls
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    ]


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


def words(command):
    return shlex.split(command.replace("\\\n", " "))


def is_key(dotted):
    """Whether the schema has the key: a section, a setting, or anything below an open mapping."""
    kind = Config
    for name in dotted.split("."):
        if kind is dict:
            return True
        if not isinstance(kind, type) or name not in fields_of(kind):
            return False
        kind = fields_of(kind)[name]
    return True


def test_every_flag_of_open_clip_has_one_row_and_no_other_flag_has_any():
    rows = [row[0].strip("| `") for row in ROWS if row[0].startswith("| `--")]
    assert sorted(rows) == sorted(flags_of_open_clip())


def test_every_row_of_flags_has_three_cells():
    flags = [row for row in ROWS if row[0].startswith("| `--")]
    assert [row for row in flags if len(row) != 3 or not row[1].strip()] == []


def test_every_key_exists():
    pattern = re.compile(r"(?<![\w/.])(?:data|model|loss|optim|train|eval|run)\.[a-z0-9_.]+")
    keys = {key for span in SPANS if span != "model.model" for key in pattern.findall(span)}
    assert len(keys) > 50
    assert sorted(key for key in keys if not is_key(key)) == []


def test_every_verb_exists():
    verbs = {span.split()[1] for span in SPANS if span.startswith("vlm ")}
    assert verbs
    assert verbs <= {verb.split()[0] for verb in VERBS}


def test_the_example_uses_flags_of_open_clip():
    theirs = words(blocks("sh")[0].partition("open_clip_train.main")[2])
    assert {word for word in theirs if word.startswith("--")} <= set(flags_of_open_clip())


def test_the_examples_file_and_its_overrides_are_the_same_run(tmp_path):
    file = tmp_path / "cc12m.yaml"
    file.write_text(blocks("yaml")[0])
    shipped, *arguments = words(blocks("sh")[2].partition("vlm train ")[2])
    overrides = [word for word in arguments if "=" in word]
    assert load_config(file) == load_config(shipped, overrides)


def test_the_batch_and_the_steps_of_the_example_add_up():
    theirs = words(blocks("sh")[0])
    flags = ("--batch-size", "--accum-freq", "--train-num-samples", "--epochs", "--workers")
    batch, accumulated, samples, epochs, workers = (
        int(theirs[theirs.index(flag) + 1]) for flag in flags
    )
    ranks = int(theirs[1].removeprefix("--nproc-per-node="))
    whole = batch * accumulated * ranks
    per_worker = math.ceil(math.ceil(samples / (batch * ranks)) / workers)
    assert f"= {whole:,} pairs a step" in PAGE
    assert f"= {math.ceil(epochs * samples / whole):,}." in PAGE
    assert f"= {per_worker * workers // accumulated * epochs:,}." in PAGE


MODELS = {row[0].strip("| `"): row[1].strip("| `") for row in ROWS if len(row) == 2}


@pytest.mark.parametrize("name", MODELS)
def test_a_models_name_is_what_its_config_builds(name):
    shipped, *overrides = MODELS[name].split()
    ours = load_config(shipped, overrides).model
    theirs = json.loads(installed("open_clip", f"model_configs/{name}.json").read_text())
    text = theirs["text_cfg"]
    assert ours.embed_dim == theirs["embed_dim"]
    assert ours.image.image_size == theirs["vision_cfg"]["image_size"]
    assert (ours.activation == "quick_gelu") == theirs.get("quick_gelu", False)
    assert (ours.text.context_length, ours.text.width) == (text["context_length"], text["width"])
    assert (ours.text.num_heads, ours.text.depth) == (text["heads"], text["layers"])
    backbones = installed("timm", "models").glob("*.py")
    assert any(f"\ndef {ours.image.name}(" in file.read_text() for file in backbones)


def test_what_is_called_from_python_exists():
    (code,) = blocks("python")
    ours = "\n".join(line for line in code.splitlines() if not line.startswith("#"))
    tree = ast.parse((ROOT / "vlm/inference.py").read_text())
    (model,) = (n for n in tree.body if getattr(n, "name", "") == "VisionLanguageModel")
    names = {n.name for n in ast.walk(model) if isinstance(n, ast.FunctionDef)}
    names |= {n.attr for n in ast.walk(model) if isinstance(n, ast.Attribute)}
    assert set(re.findall(r"\bmodel\.(\w+)", ours)) <= names
    assert set(re.findall(r"\bvlm\.(\w+)", ours)) <= set(vlm.__all__)


def test_the_suites_keys_exist():
    tree = ast.parse((ROOT / "vlm/eval/tasks.py").read_text())
    classes = {node.name: ast.walk(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    keys = {
        name: {node.target.id for node in nodes if isinstance(node, ast.AnnAssign)}
        for name, nodes in classes.items()
    }
    kinds = {"zero_shot": "ZeroShotTask", "retrieval": "RetrievalTask"}
    for task in read_yaml(blocks("yaml")[1]).values["tasks"]:
        assert set(task) <= keys["Task"] | keys[kinds[task["task"]]]
