"""Forks processes that train or save, so that a hundred kills cost no hundred imports of torch.

Reads a line of JSON for each on standard input, {"job", "args", "out", "gate", "env"}, forks, and
answers with the child's pid; {"poll": pid} answers with how it ended, null while it lives. Each
child leads a process group of its own and begins once the file `gate` exists, if one is named.
"""

import json
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm.runtime import torchvision_guard

torchvision_guard.install()

import torch  # noqa: E402

from vlm import checkpoint  # noqa: E402
from vlm.errors import VlmError  # noqa: E402
from vlm.training.loop import train  # noqa: E402

torch.set_num_threads(1)


def tensors(step):
    """What the checkpoint of a step holds."""
    values = torch.arange(30_000, dtype=torch.float32) + step
    return {
        "model": {"weight": values, "scale": values[0].clone()},
        "optimizer": {"weight/step": values},
    }


def save(folder, first, last, keep=2):
    """Save in a thread, as a run does; strace counts a thread's calls from its start."""

    def loop():
        for step in range(first, last + 1):
            state = {"step": step, "fingerprint": "data"}
            checkpoint.save(Path(folder), step, tensors(step), state, keep=keep)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(loop).result()


def run(config, overrides):
    """Train, or go on."""
    train(config, overrides, resume="auto")


JOBS = {"save": save, "run": run}


def child(request):
    """Do a job; the exit code is the error's."""
    os.setpgid(0, 0)
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.update(request.get("env", {}))
    while request.get("gate") and not os.path.exists(request["gate"]):
        time.sleep(0.002)
    try:
        JOBS[request["job"]](**request["args"])
    except VlmError as error:
        # not by write(2): strace's injection counts the calls of every thread
        os.writev(1, [f"error: {error}\n".encode()])
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    """Serve until standard input ends."""
    with TemporaryDirectory() as folder:  # imports what children would each import late
        checkpoint.save(Path(folder), 1, tensors(1), {"step": 1}, keep=2)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                code = child(request)
                sys.stdout.flush()
                os._exit(code)
            os.setpgid(answer, answer)  # in both: whoever asks may kill the group at once
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
