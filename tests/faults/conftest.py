"""Faults on purpose: a server that forks what is to be killed, small disks, and strace."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
CONFIG = """\
data: {{train: "{folder}/*.tar", num_workers: 0}}
model:
  embed_dim: 16
  image:
    name: vit_tiny_patch16_224
    image_size: 16
    pool: avg
    kwargs: {{embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, class_token: false}}
  text: {{tokenizer: "bpe:300", context_length: 12, width: 32, depth: 1, num_heads: 2}}
optim: {{name: muon, lr: 1e-3, warmup_steps: 5}}
train: {{steps: 30, global_batch_size: 8, precision: fp32, device: cpu, ema_decay: 0.9}}
run: {{save_every_steps: 3, log_every_steps: 1}}
"""
SHARDS = (61, 40, 23)  # samples of each


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A tiny run's config: pictures of noise, 30 steps, a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("faults")
    rng = np.random.default_rng(0)
    for shard, count in enumerate(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(count):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(picture, "PNG")
                caption = f"picture {i} of shard {shard}".encode()
                for name, data in (("png", picture.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:04d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


@pytest.fixture(scope="session")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


class Child:
    """A forked job: the leader of a process group of its own."""

    def __init__(self, ask, pid, out):
        self.ask, self.pid, self.out = ask, pid, out
        self.code = None

    def poll(self):
        """The exit code, -9 for SIGKILL; None while it lives."""
        if self.code is None:
            self.code = self.ask({"poll": self.pid})
        return self.code

    def wait(self, timeout_s=120):
        """The exit code and what it printed."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running: {self.out.read_text()[-2000:]}"
            time.sleep(0.002)
        return self.code, self.out.read_text()

    def send_kill(self):
        """SIGKILL the group, if it still runs."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


class ForkServer:
    """Called with a job of fork_server.py and its arguments, it starts it."""

    def __init__(self, launcher, environment, outs):
        self.process = subprocess.Popen(
            [*launcher, sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.outs, self.number = outs, 0

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self, job, *, gate=None, env=None, **args):
        self.number += 1
        out = self.outs / str(self.number)
        request = {"job": job, "args": args, "out": str(out), "env": env or {}}
        if gate is not None:
            request["gate"] = str(gate)
        return Child(self.ask, self.ask(request), out)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def fork(environment, tmp_path_factory):
    """Start a job of fork_server.py in a process group of its own."""
    server = ForkServer([], environment, tmp_path_factory.mktemp("out"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def fork_on_small_disks(request, environment, tmp_path_factory):
    """`fork`, in a mount namespace with file systems of its own, and the folder of these.

    full: 4 MiB; inodes: 20 files at most; readonly. From outside they are under /proc/PID/root.
    """
    disks = tmp_path_factory.mktemp("disks")
    options = {"full": "size=4m", "inodes": "nr_inodes=20", "readonly": "ro"}
    mounts = [f"mount -t tmpfs -o {option} none {disks}/{name}" for name, option in options.items()]
    for name in options:
        (disks / name).mkdir()
    namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    probe = subprocess.run([*namespace, " && ".join(mounts)], capture_output=True, text=True)
    if probe.returncode:
        assert not request.config.option.require_system, probe.stderr
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")
    script = " && ".join([*mounts, 'exec "$@"'])
    server = ForkServer([*namespace, script, "sh"], environment, tmp_path_factory.mktemp("out"))
    assert server("save", folder=str(disks / "full" / "probe"), first=1, last=1).wait()[0] == 0
    yield server, Path(f"/proc/{server.process.pid}/root{disks}"), disks
    server.close()


@pytest.fixture
def traced(fork, tmp_path):
    """Run a job of the fork server under strace: its exit code, its output and strace's log."""
    number = iter(range(1_000_000))

    def traced(job, *options, **args):
        name = next(number)
        gate, log = tmp_path / f"gate-{name}", tmp_path / f"strace-{name}"
        child = fork(job, gate=gate, **args)
        strace = subprocess.Popen(
            ["strace", "-f", "-y", "-p", str(child.pid), "-o", str(log), *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "attached" in strace.stderr.readline()
        gate.touch()
        code, out = child.wait()
        strace.stderr.close()
        strace.wait(timeout=10)
        return code, out, log.read_text()

    return traced
