"""What all tests share: the torchvision guard, and what a missing system package means."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from vlm.runtime import torchvision_guard

torchvision_guard.install()
torch.set_num_threads(1)  # tests are small, and run side by side


def pytest_addoption(parser):
    parser.addoption(
        "--require-system", action="store_true", help="fail where a system package is missing"
    )


def pytest_collection_modifyitems(config, items):
    long = "long" in (config.option.markexpr or "")
    missing = "" if shutil.which("chromium") else "chromium is not installed"
    for item in items:
        if item.get_closest_marker("long") and not long:
            item.add_marker(pytest.mark.skip(reason="long form: make test-long"))
        if item.get_closest_marker("system") and missing:
            if config.option.require_system:
                raise pytest.UsageError(f"{missing}, and --require-system was given")
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


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
