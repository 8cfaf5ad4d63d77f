"""The front door: the overview, the verbs, how problems reach the user, the package's names."""

import importlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vlm
from vlm import errors
from vlm.cli.main import VERBS, main

ROOT = Path(vlm.__file__).parents[1]
HEAVY = {"torch", "pydantic", "yaml", "numpy", "PIL"}
PROBES = {
    "ok": "print('ran', args.subject, args.words, args.flag); return 0",
    "config": "raise errors.ConfigError(['a.yaml:5: wrong', 'a.yaml:7: \\x1b[31mred\\nline'])",
    "bug": "raise KeyError('ours')",
    "wait": "print('ready', flush=True); time.sleep(60); return 0",
    "flood": "print('x' * 10_000_000); return 0",
}  # fmt: skip


@pytest.fixture(scope="session")
def vlm_with_probes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a `vlm` that has a few more verbs, each a file as any other."""
    folder = tmp_path_factory.mktemp("probes")
    for name, body in PROBES.items():
        (folder / f"probe_{name}.py").write_text(
            "import time\nfrom vlm import errors\nHELP = 'probe the command line'\n"
            "def add_arguments(parser):\n"
            "    parser.add_argument('subject', metavar='DATA')\n"
            "    parser.add_argument('words', nargs='*', default=[])\n"
            "    parser.add_argument('--flag', type=int, default=0)\n"
            f"def run(args):\n    {body}\n"
        )
    script = folder / "vlm_with_probes.py"
    script.write_text(
        "import sys, vlm.cli\nfrom vlm.cli.main import VERBS, Verb, main\n"
        f"vlm.cli.__path__.append({str(folder)!r})\n"
        f"for name in {list(PROBES)}:\n"
        "    VERBS[f'probe {name}'] = Verb('Probe', 'probe', 'x')\n"
        "sys.exit(main())\n"
    )
    return [sys.executable, str(script)]


def run(command: list[str], *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(
        [*command, *words], env=env, capture_output=True, text=True, timeout=30, check=False
    )


def test_help_lists_every_verb_with_an_example(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, (group, text, example) in VERBS.items():
        assert f"\n{group}\n" in out
        assert f"  {verb:<19}{text}\n" in out
        assert f"{verb}  " in out
        assert f" vlm {verb} {example}\n" in out
    assert all(len(line) <= 100 for line in out.splitlines())
    assert out.isascii()


def children_cpu_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_takes_less_than_a_third_of_a_second_and_imports_nothing_heavy():
    seconds = []  # of the processor, the best of five: a busy machine is not our doing
    for _ in range(5):
        before = children_cpu_s()
        assert run([sys.executable, "-m", "vlm"], "--help").returncode == 0
        seconds.append(children_cpu_s() - before)
    assert min(seconds) < 0.3
    modules = modules_after("from vlm.cli.main import main; main(['--help'])")
    assert "vlm.cli.main" in modules
    assert not modules & HEAVY


def test_no_verb_is_an_error_that_shows_the_verbs(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "vlm train clip_vit_b32" in captured.err


@pytest.mark.parametrize(
    ("words", "code"), [(["data"], 2), (["data", "-h"], 0), (["help", "data"], 0)]
)
def test_a_group_alone_lists_its_verbs(capsys, words, code):
    assert main(words) == code
    captured = capsys.readouterr()
    shown = captured.err if code else captured.out
    assert "data pack" in shown
    assert "classify" not in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlm {vlm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["trian"], "unknown verb trian; did you mean train?"),
        (["tokenizer"], "unknown verb tokenizer; did you mean data tokenizer?"),
        (["data", "pak", "x"], "unknown verb data pak; did you mean data pack?"),
        (["zzz"], "unknown verb zzz; see vlm --help"),
        (["--foo"], "unknown option --foo; see vlm --help"),
        (["\x1b[31m"], r"unknown verb \x1b[31m; see vlm --help"),
    ],
)
def test_an_unknown_verb_comes_with_the_nearest(capsys, words, problem):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {problem}\n")


def test_a_verb_runs_with_options_between_its_words(vlm_with_probes):
    done = run(vlm_with_probes, "probe", "ok", "photos", "a=1", "--flag", "3", "b=-1")
    assert (done.returncode, done.stdout) == (0, "ran photos ['a=1', 'b=-1'] 3\n")


@pytest.mark.parametrize("words", [("probe", "ok", "--help"), ("help", "probe", "ok")])
def test_help_of_a_verb_explains_data_and_model(vlm_with_probes, words):
    done = run(vlm_with_probes, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: vlm probe ok [-h] [--flag FLAG] DATA [words ...]" in done.stdout
    assert "vlm probe ok x\n" in done.stdout
    assert "\nDATA    a shard pattern" in done.stdout
    assert "\nMODEL   a run folder" in done.stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "the following arguments are required: DATA"),
        (["x", "--flag", "no"], "argument --flag: invalid int value: 'no'"),
        (["x", "--fla", "1"], "unrecognized arguments: --fla 1"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(vlm_with_probes, words, problem):
    done = run(vlm_with_probes, "probe", "ok", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {problem}; see vlm probe ok --help\n"


def test_problems_are_one_escaped_line_each_and_give_the_exit_code(vlm_with_probes):
    done = run(vlm_with_probes, "probe", "config", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: a.yaml:5: wrong\n" + r"error: a.yaml:7: \x1b[31mred\nline" + "\n"
    )


def test_vlm_debug_adds_the_traceback(vlm_with_probes):
    done = run(vlm_with_probes, "probe", "config", "x", VLM_DEBUG="1")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "error: a.yaml:5: wrong\n" in done.stderr


def test_our_own_bug_keeps_its_traceback_and_exits_1(vlm_with_probes):
    done = run(vlm_with_probes, "probe", "bug", "x")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("KeyError: 'ours'\n")


@pytest.mark.parametrize(
    "kind", [getattr(errors, name) for name in dir(errors) if name.endswith(("Error", "Preempted"))]
)
def test_every_kind_of_error_exits_with_its_code(capsys, monkeypatch, kind):
    def fail(words: list[str]) -> int:
        raise kind("why")

    monkeypatch.setattr("vlm.cli.main._run", fail)
    assert main(["x"]) == kind.exit_code
    prefix = "" if kind is errors.Preempted else "error: "
    assert capsys.readouterr().err == f"{prefix}why\n"


def test_interrupting_exits_130_without_a_traceback(vlm_with_probes):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*vlm_with_probes, "probe", "wait", "x"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore it, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize("words", [["probe", "flood", "x"], ["--help"]])
def test_a_closed_pipe_is_quiet(vlm_with_probes, words):
    read_end, write_end = os.pipe()
    os.close(read_end)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*vlm_with_probes, *words],
        env=env,
        stdout=write_end,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_that_keeps_the_protocol(capsys, verb):
    module = importlib.import_module(f"vlm.cli.{verb.replace(' ', '_')}")
    assert callable(module.run)
    assert main([*verb.split(), "--help"]) == 0
    assert module.HELP.splitlines()[0] in capsys.readouterr().out


def modules_after(script: str) -> set[str]:
    done = run([sys.executable, "-c", f"import sys; {script}; print(*sys.modules)"])
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_no_verb_imports_anything_heavy_before_it_runs():
    names = ", ".join(f"vlm.cli.{verb.replace(' ', '_')}" for verb in VERBS)
    assert not modules_after(f"import {names}") & HEAVY


def test_a_report_needs_no_torch():
    assert "torch" not in modules_after("import vlm.report.page")


def test_the_package_imports_its_names_when_they_are_used():
    assert not modules_after("import vlm; dir(vlm)") & HEAVY
    modules = modules_after("import vlm; vlm.load_config; vlm.Config; vlm.__version__")
    assert "torch" not in modules
    assert "pydantic" in modules


@pytest.mark.parametrize("name", vlm.__all__)
def test_every_name_of_the_package_exists(name):
    value = getattr(vlm, name)
    assert name in dir(vlm)
    assert name == "__version__" or value.__name__ == name


def test_rooms_do_not_shadow_names():
    importlib.import_module("vlm.training")
    importlib.import_module("vlm.config")
    assert callable(vlm.train)
    assert vlm.config.__name__ == "vlm.config"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vlm' has no attribute 'nope'"):
        _ = vlm.nope
