"""Nothing in vlm/ runs text, unpickles or calls a shell: a scan of every file's syntax tree."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vlm"
BUILT_IN = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.package", "torch.hub.load",
    "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "runpy.run_path", "wds.decode", "webdataset.decode",
    "dist.all_gather_object", "dist.broadcast_object_list", "dist.gather_object",
    "dist.scatter_object_list", "dist.send_object_list",
}  # fmt: skip
ARGUMENTS = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}


def violations(source):
    """Line and name of each forbidden thing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [(node.lineno, name) for name in _names(node) if _is_forbidden(name)]
        if isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            given = getattr(node.value, "value", "something computed")
            if given is not (not ARGUMENTS[node.arg]):
                found.append((node.value.lineno, f"{node.arg}={given}"))
    return found


def _names(node):
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Load) else []
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _is_forbidden(name):
    return name in BUILT_IN or name in CALLS or name.partition(".")[0] in MODULES


@pytest.mark.parametrize(
    "planted",
    [
        "eval(text)",
        "run = exec",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "import pickle",
        "from pickle import loads",
        "import dill as json",
        "import marshal",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "f(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(words, shell=True)",
        "subprocess.run(words, shell=flag)",
        "os.system('ls')",
        "from os import system",
        "os.popen('ls')",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "dataset.map(wds.decode('pil'))",
        "dist.broadcast_object_list(things)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_a_planted_violation_is_found(planted):
    assert violations(f"import os\n\ndef f():\n    {planted}\n")


@pytest.mark.parametrize(
    "allowed",
    [
        "model.eval()",
        "eval: int = 1",
        "re.compile(x)",
        "json.load(file)",
        "torch.compile(f)",
        "run(x, shell=False)",
    ],
)
def test_what_only_looks_like_one_is_not(allowed):
    assert violations(allowed) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_package_has_none(path):
    assert violations(path.read_text()) == []
