"""What all tests share: a tiny model, shards of squares, what a missing program means."""

import io
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from vlm.runtime import torchvision_guard

torchvision_guard.install()
torch.set_num_threads(1)  # tests are small, and run side by side

NOT_INSTALLED = " is not installed"
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def pytest_addoption(parser):
    parser.addoption(
        "--require-system", action="store_true", help="fail where a system program is missing"
    )


def pytest_collection_modifyitems(config, items):
    if "long" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long form: make test-long"))


def pytest_runtest_setup(item):
    for mark in item.iter_markers("system"):
        if not mark.args:
            pytest.fail('the mark needs a program: @pytest.mark.system("strace")')
        for program in mark.args:
            if not shutil.which(program):
                stop = pytest.fail if item.config.option.require_system else pytest.skip
                stop(f"{program}{NOT_INSTALLED}")


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("skipped", [])
    reasons = (r.longrepr[2].removeprefix("Skipped: ") for r in reports)
    for reason, count in Counter(r for r in reasons if r.endswith(NOT_INSTALLED)).items():
        terminalreporter.write_line(f"{count} skipped: {reason}", yellow=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Each passed case of a test marked `fault("C1")` is one row of the ledger."""
    report = yield
    mark = item.get_closest_marker("fault")
    if mark and report.when == "call" and report.passed:
        note(*mark.args, item.originalname.removeprefix("test_").replace("_", " "), 1, "so it was")
    return report


def note(letter, fault, count, outcome):
    """Add to the ledger: a fault, how often it was injected, and what came of it."""
    if path := os.environ.get("VLM_FAULTS_OUT"):
        row = {"letter": letter, "fault": fault, "count": count, "outcome": outcome}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def record():
    """`note`: for what is counted inside of a test."""
    return note


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def encoded():
    """A square of a colour as PNG bytes."""

    def encoded(colour, width=40):
        buffer = io.BytesIO()
        Image.new("RGB", (width, 36), colour).save(buffer, "PNG")
        return buffer.getvalue()

    return encoded


@pytest.fixture(scope="session")
def make_model():
    """Makes tiny models with random weights, equal each time."""
    # Imported here: the tests of rooms that know no model start without timm.
    from vlm.config.schema import CaptionerConfig, ImageConfig, ModelConfig, TextConfig
    from vlm.heads.model import build_model
    from vlm.inference import VisionLanguageModel
    from vlm.tokenizer import train_bpe

    config = ModelConfig(
        embed_dim=16,
        image=ImageConfig(
            name="vit_tiny_patch16_224",
            image_size=32,
            kwargs={"embed_dim": 32, "depth": 1, "num_heads": 2},
        ),
        text=TextConfig(context_length=24, width=32, depth=1, num_heads=2),
        captioner=CaptionerConfig(width=32, depth=1, num_heads=2),
    )
    texts = [f"a {colour} square" for colour in COLOURS]

    def make_model(*, captioner=True):
        torch.manual_seed(0)
        settings = config if captioner else replace(config, captioner=None)
        tokenizer = train_bpe(texts, vocab_size=300, context_length=24)
        network = build_model(settings, tokenizer)
        return VisionLanguageModel(network, settings, tokenizer, torch.device("cpu"))

    return make_model


@pytest.fixture(scope="session")
def model(make_model):
    """A tiny model with a captioner. Not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def shards(encoded, tmp_path_factory):
    """12 pictures of 6 colours; `0-red` also has a caption that `1-red` lacks; one is broken."""
    path = tmp_path_factory.mktemp("data") / "squares-0000.tar"
    with TarWriter(str(path)) as writer:
        for artist in range(2):
            for colour in COLOURS:
                captions = [f"a {colour} square", f"artist {artist} paints {colour}"]
                meta = {"captions": captions, "label": colour, "concept": colour, "artist": artist}
                fields = {"png": encoded(colour), "json": json.dumps(meta).encode()}
                writer.write({"__key__": f"{artist}-{colour}", **fields})
        writer.write({"__key__": "broken", "png": encoded("red")[:-30], "json": b"{}"})
    return path


class _Web(ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1, ranges too; `faults` answer a path's next requests instead."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.block_on_close = False  # of a request that stalls
        self.folder, self.faults, self.log, self.over = folder, {}, [], threading.Event()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def count(self, suffix):
        return sum(path.endswith(suffix) for path in self.log)

    def handle_error(self, request, client_address):
        pass  # a client that left


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.log.append(self.path)
        file = self.server.folder / self.path.lstrip("/").partition("?")[0]
        content = file.read_bytes() if file.is_file() else None
        if faults := self.server.faults.get(self.path):
            faults.pop(0)(self, content)
        elif content is None:
            self.send_error(404)
        else:
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.answer(content[begin:], whole=len(content))

    def answer(self, body, *, whole):
        """Sends the end of a file of `whole` bytes, or all of it."""
        self.send_response(206 if len(body) < whole else 200)
        self.send_header("Content-Length", str(len(body)))
        begin = whole - len(body)
        self.send_header("Content-Range", f"bytes {begin}-{whole - 1}/{whole}")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server over `tmp_path / "www"`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "www").mkdir()
    server = _Web(tmp_path / "www")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


class Ranks:
    """The processes of one command, on one rank or several, each with a log of its own."""

    def __init__(self, folder, world_size, script, names):
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.logs = [folder / f"log-{rank}" for rank in range(world_size)]
        size = str(world_size)
        group = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = multiprocessing.get_context("forkserver").Process(
                target=runpy.run_path,
                args=(str(script),),
                kwargs={
                    "init_globals": {**names, "LOG": str(log), "ENVIRONMENT": environment},
                    "run_name": "__main__",
                },
            )
            process.start()
            self.processes.append(process)

    def alive(self):
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def said(self, rank=0):
        """The lines on a rank's standard output and error."""
        return self.logs[rank].read_text().splitlines() if self.logs[rank].exists() else []

    @property
    def text(self):
        """What all of them said."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def errors(self):
        """The first line of every rank that is a problem, by rank."""
        found = {}
        for rank in range(len(self.logs)):
            for line in self.said(rank):
                if line.startswith("error: ") or "asked to stop" in line:
                    found.setdefault(rank, line)
        return found

    def wait(self, timeout_s=120, ranks=None):
        """The exit codes of these ranks, or of all."""
        deadline = time.monotonic() + timeout_s
        waited_for = [p for r, p in enumerate(self.processes) if ranks is None or r in ranks]
        for process in waited_for:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(p.is_alive() for p in waited_for), self.text
        return [process.exitcode for process in waited_for]

    def finish(self):
        """What they said, once all have ended well."""
        codes = self.wait(300)
        assert set(codes) == {0}, self.text
        return self.text

    def until(self, text, rank=0, timeout_s=60):
        """Wait until a rank has said so."""
        deadline = time.monotonic() + timeout_s
        while not any(text in line for line in self.said(rank)):
            assert time.monotonic() < deadline, self.said(rank)
            assert self.processes[rank].is_alive(), self.said(rank)
            time.sleep(0.01)

    def kill(self):
        """SIGKILL to all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def close(self):
        self.kill()
        for process in self.processes:
            process.close()


_started = []


@pytest.fixture(autouse=True)
def _end_ranks():
    yield
    while _started:
        _started.pop().close()


@pytest.fixture(scope="session")
def fork_ranks(tmp_path_factory):
    """Runs a script on so many ranks, forked with everything imported: 0.3 s in place of 4.

    Its upper-case names are given to it: LOG, a path; ENVIRONMENT, that of torchrun; and NAMES.
    """
    used = ["torch._dynamo", "vlm.data.loader", "vlm.training.loop"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(used)
    forkserver.ensure_running()  # with the environment of now, not of a test that changes it

    def fork_ranks(world_size, script, **names):
        folder = tmp_path_factory.mktemp("ranks") / "logs"
        _started.append(Ranks(folder, world_size, script, names))
        return _started[-1]

    return fork_ranks


@pytest.fixture(scope="session")
def vlm_on(fork_ranks):
    """Starts a command on so many ranks."""
    script = Path(__file__).with_name("rank.py")
    return lambda world_size, *words: fork_ranks(world_size, script, WORDS=[*map(str, words)])
