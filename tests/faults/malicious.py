"""Reads malicious artefacts under an audit hook; run by test_malicious.py in a process of its own.

    python malicious.py FOLDER

Every payload tries to write FOLDER/executed, to start a process or to open a socket. Prints JSON:
what each artefact led to, and the audit events of code, processes, sockets and files that it
caused; last, those of webdataset's stock decoder, which must cause some.
"""

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from itertools import count
from pathlib import Path

import fsspec.core  # noqa: F401  # before anybody watches
import numpy as np
import torch
import webdataset
from PIL import Image

import vlm.training.loop  # noqa: F401  # all that training imports, before anybody watches
from vlm import checkpoint
from vlm.config.load import load_config
from vlm.data.dataset import open_shards
from vlm.data.loader import evaluation_batches, training_batches
from vlm.data.order import SampleOrder
from vlm.data.samples import BadSample
from vlm.data.transforms import EvalTransform, TrainTransform
from vlm.errors import VlmError
from vlm.eval.suite import load_suite
from vlm.heads.model import build_model
from vlm.hub.load import load
from vlm.inference import VisionLanguageModel
from vlm.tokenizer import train_bpe

FOLDER = Path(sys.argv[1])
NUMBERS = count()
MARKER = FOLDER / "executed"
WATCHED = {
    "exec", "compile", "pickle.find_class", "marshal.loads", "code.__new__", "os.system",
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "urllib.Request", "import", "ctypes.dlopen",
    "os.remove", "os.symlink", "os.link", "shutil.rmtree", "os.chmod",
}  # fmt: skip
OURS = (".idx", ".tmp-")  # indexes, and what they are written as before they are renamed
watching, events = False, []


def hook(event, arguments):
    if not watching:
        return
    if event in WATCHED and not (event == "os.remove" and _is_index(arguments[0])):
        events.append(f"{event} {str(arguments[:1])[:80]}")
    if event == "open" and isinstance(arguments[2], int):
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not _is_index(path):
            events.append(f"open for writing {str(path)[:80]}")


def _is_index(path):
    return isinstance(path, str | Path) and any(part in Path(path).name for part in OURS)


class Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


PAYLOADS = {
    "os.system": Payload(os.system, f"touch {MARKER}"),
    "Popen": Payload(subprocess.Popen, ["touch", str(MARKER)]),
    "exec": Payload(exec, f"open({str(MARKER)!r}, 'w')"),
    "eval": Payload(eval, f"open({str(MARKER)!r}, 'w')"),
    "open": Payload(open, str(MARKER), "w"),
    "socket": Payload(socket.create_connection, ("127.0.0.1", 9)),
}
SUFFIXES = ("pyd", "pkl", "pickle", "pth", "npy", "ten")


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def write_tar(name, members):
    path = FOLDER / name
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pickled(suffix, payload):
    if suffix == "npy":
        file = io.BytesIO()
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)
        return file.getvalue()
    return pickle.dumps(payload)


TOKENIZER = train_bpe(["a thing"], vocab_size=300, context_length=8)
CONFIG = load_config("tiny").model


def read_shards(pattern):
    """All that is ever done with a shard: index it, read, train and evaluate on it."""
    dataset = open_shards(str(pattern))
    readable = 0
    for sample_id in range(len(dataset)):
        try:
            dataset.read(sample_id)
            readable += 1
        except BadSample:
            pass
    list(dataset.captions()), list(dataset.metas())
    size = len(dataset)
    order = SampleOrder(dataset.shard_sizes, seed=0, streams=1, global_batch_size=size)
    training = training_batches(
        dataset,
        order,
        transform=TrainTransform(8),
        tokenizer=TOKENIZER,
        seed=0,
        micro_batch_size=size,
    )
    valid = int(next(training).valid.sum())
    list(evaluation_batches(dataset, transform=EvalTransform(8), batch_size=size))
    return (
        f"{size} samples, {readable} read, {valid} valid, {sum(dataset.rejects.values())} rejects"
    )


# --- shards ---


def shard_artefacts():
    for suffix in SUFFIXES:
        for name, payload in PAYLOADS.items():
            members = [
                ("a.png", picture()),
                ("a.txt", b"a"),
                (f"a.{suffix}", pickled(suffix, payload)),
            ]
            path = write_tar(f"{suffix}-{name}.tar", members)
            yield f"shard {suffix} {name}", read_shards, path
    for suffix in ("png", "txt", "json", "cls", "jpg"):
        members = [("a.png", picture()), ("b.png", picture()), ("b.txt", b"b")]
        members = [(n, d) for n, d in members if n != f"a.{suffix}"]
        payload = pickle.dumps(PAYLOADS["os.system"])
        path = write_tar(f"as-{suffix}.tar", [(f"a.{suffix}", payload), *members])
        yield f"shard, a pickle as {suffix}", read_shards, path
    for kind in (b"1", b"2", b"3", b"4", b"6"):
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = kind, "/etc/passwd"
        path = write_tar(f"kind-{kind.decode()}.tar", [("a.png", picture()), (link, b""), *GOOD])
        yield f"shard, member of type {kind.decode()}", read_shards, path
    for name in ("../../a.png", "/etc/a.png", "a/../../b.png", "$(touch x).png", "|touch x;.png"):
        path = write_tar(
            f"name-{sha256(name.encode()).hexdigest()}.tar", [(name, picture()), *GOOD]
        )
        yield f"shard, member {name}", read_shards, path


GOOD = [("z.png", picture()), ("z.txt", b"z")]


def spec_artefacts():
    """No URL that fsspec knows: to name one is to ask for it."""
    touch = f"touch {MARKER}"
    for spec in (
        f"pipe:{touch}", f"PIPE:{touch}", f"pipe:{touch} #.tar", f"|{touch}", f"{touch} |",
        "file:/etc/passwd", "-", ";id", f";{touch}", "$(id)", f"$({touch})",
        f"`{touch}`", "${HOME}", "${HOME}/x.tar", "@x", "@/etc/passwd", f"x.tar;{touch}",
        "x{0..9999999999}.tar", "{0..999}{0..999}{0..999}.tar", "{" * 5000, "{a,b}" * 30,
        "http://169.254.169.254/x{0..99999999}.tar", "ais://b/x.tar",
        "scp:h:x.tar", "rsync:h", "wds:x", "\0", "x\0.tar",
        "\ud800.tar", "~nobody/../x.tar", "/dev/stdin", "/dev/zero", "/proc/self/environ", "",
    ):  # fmt: skip
        yield f"spec {spec[:40]!r}", read_shards, spec


# --- checkpoints and model folders ---


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def weights():
    name = "encoders.logit_scale"
    return {
        "a pickle": pickle.dumps(PAYLOADS["os.system"]),
        "a torch.save": torch_saved(PAYLOADS["os.system"]),
        "a header of 2^63 bytes": safetensors(b"{}", length=2**63),
        "a header of 2^64 - 1 bytes": safetensors(b"{}", length=2**64 - 1),
        "a header of 100 MB": safetensors(b" " * 100_000_001 + b"{}"),
        "a header beyond the end": safetensors(b"{}", length=1000),
        "20,000 entries": safetensors({f"t{i}": tensor([0], 0, 0) for i in range(20_000)}),
        "overlapping offsets": safetensors(
            {"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)
        ),
        "offsets beyond the end": safetensors({"a": tensor([2], 0, 8)}, bytes(4)),
        "a hole": safetensors({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
        "negative offsets": safetensors({"a": tensor([1], -4, 0)}, bytes(4)),
        "duplicate keys": safetensors(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        "a shape that overflows": safetensors({name: tensor([2**62, 2**62, 16], 0, 4)}, bytes(4)),
        "a shape of 2^40": safetensors({name: tensor([2**40], 0, 4)}, bytes(4)),
        "a wrong shape": safetensors({name: tensor([3, 5], 0, 60)}, bytes(60)),
        "a wrong type": safetensors({name: tensor([], 0, 8, "I64")}, bytes(8)),
        "an unknown type": safetensors({name: tensor([], 0, 8, "PICKLE")}, bytes(8)),
        "no JSON": safetensors(b"cos\nsystem\n(S'touch x'\ntR."),
        "JSON nested 100,000 deep": safetensors(b"[" * 100_000),
        "extra keys": safetensors({"__class__": tensor([1], 0, 4)}, bytes(4)),
        "nothing": b"",
    }


def torch_saved(payload):
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def write_checkpoint(folder, files):
    """A checkpoint whose manifest is right: its maker controls the hashes too."""
    path = folder / "step-00000001"
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    entries = {n: {"size_bytes": len(d), "sha256": sha256(d).hexdigest()} for n, d in files.items()}
    (path / "manifest.json").write_text(json.dumps({"version": 1, "files": entries}))
    return folder


def read_checkpoint(folder):
    found = checkpoint.load_newest(folder)
    return f"{sum(len(group) for group in found.groups.values())} tensors"


def checkpoint_artefacts():
    for name, data in weights().items():
        files = {"model.safetensors": data, "state.json": b"{}"}
        folder = write_checkpoint(FOLDER / "checkpoints" / sha256(name.encode()).hexdigest(), files)
        yield f"checkpoint, {name}", read_checkpoint, folder
    for name, data in {"a pickle": pickle.dumps(PAYLOADS["exec"]), "nested": b"[" * 10**5}.items():
        folder = write_checkpoint(FOLDER / "states" / name, {"state.json": data})
        yield f"checkpoint, state.json: {name}", read_checkpoint, folder
        folder = write_checkpoint(FOLDER / "manifests" / name, {})
        (folder / "step-00000001" / "manifest.json").write_bytes(data)
        yield f"checkpoint, manifest.json: {name}", read_checkpoint, folder


def model_folder(files):
    folder = FOLDER / "models" / str(next(NUMBERS))
    folder.mkdir(parents=True)
    for file in HEALTHY_MODEL.iterdir():
        (folder / file.name).write_bytes(files.get(file.name, file.read_bytes()))
    return folder


HEALTHY_MODEL = FOLDER / "model"


def read_model(folder):
    load(folder, device="cpu")
    return "loaded"


def model_artefacts():
    for name, data in weights().items():
        folder = model_folder({"model.safetensors": data})
        yield f"model, {name}", read_model, folder
    healthy = json.loads((HEALTHY_MODEL / "config.json").read_text())
    evil = FOLDER / "evil.pth"
    evil.write_bytes(torch_saved(PAYLOADS["os.system"]))
    for name in ("hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/tmp", "os.system", "../x"):
        changed = json.loads(json.dumps(healthy))
        changed["model"]["image"]["name"] = name
        yield (
            f"model, image.name {name}",
            read_model,
            model_folder({"config.json": json.dumps(changed).encode()}),
        )
    for key, value in {
        "pretrained": True,
        "checkpoint_path": str(evil),
        "pretrained_cfg": "evil",
        "cache_dir": str(FOLDER),
        "_target_": "os.system",
        "__class__": "os.system",
    }.items():
        changed = json.loads(json.dumps(healthy))
        changed["model"]["image"]["kwargs"][key] = value
        yield (
            f"model, image.kwargs.{key}",
            read_model,
            model_folder({"config.json": json.dumps(changed).encode()}),
        )
    for key in ("_target_", "auto_map", "_attn_implementation_internal", "trust_remote_code"):
        changed = json.loads(json.dumps(healthy))
        changed["model"][key] = "os.system"
        yield (
            f"model, config.json with {key}",
            read_model,
            model_folder({"config.json": json.dumps(changed).encode()}),
        )
    for file in ("config.json", "tokenizer.json"):
        for name, data in {
            "a pickle": pickle.dumps(PAYLOADS["exec"]),
            "nested": b"[" * 10**5,
            "a list": b"[]",
        }.items():
            yield f"model, {file}: {name}", read_model, model_folder({file: data})


# --- YAML ---


def yaml_artefacts():
    texts = {
        "apply": f"!!python/object/apply:os.system ['touch {MARKER}']",
        "apply in a setting": f"run: {{dir: !!python/object/apply:os.system ['touch {MARKER}']}}",
        "new": f"!!python/object/new:subprocess.Popen [['touch', '{MARKER}']]",
        "name": "run: {dir: !!python/name:os.system}",
        "module": "run: {dir: !!python/module:antigravity}",
        "_target_": f"model: {{_target_: os.system, command: touch {MARKER}}}",
        "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "10^6 keys": "".join(f"k{i}: 1\n" for i in range(10**6)),
        "10^6 keys on one line": "{" + ",".join(f"k{i}: 1" for i in range(10**6)) + "}",
        "nested": "[" * 10**5,
        "a large number": "train: {seed: " + "9" * 10**5 + "}",
        "a suite of code": "import os\nos.system('touch x')",
    }
    for name, text in texts.items():
        path = FOLDER / f"{sha256(name.encode()).hexdigest()}.yaml"
        path.write_text(text)
        yield f"config, {name}", load_config, path
        yield f"suite, {name}", load_suite, path
    for word in ("model._target_=os.system", "__class__=x", "run.dir=!!python/name:os.system"):
        yield f"override {word}", lambda w: load_config("tiny", [w]), word


# --- running them ---


def attempt(read, thing):
    """What reading it led to, and the events that it caused."""
    global watching
    events.clear()
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        watching = True
        try:
            outcome = read(thing)
            outcome = outcome if isinstance(outcome, str) else type(outcome).__name__
        except VlmError as error:
            outcome = f"{type(error).__name__}: {error.problems[0][:100]}"
        except BaseException as error:
            outcome = f"ESCAPED {type(error).__name__}: {str(error)[:100]}"
        finally:
            watching = False
    return {"outcome": outcome, "events": list(events), "marker": MARKER.exists()}


def stock_decoder(path):
    list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    return "read"


def main():
    os.chdir(FOLDER)
    os.environ["XDG_CACHE_HOME"] = str(FOLDER / "cache")
    model = VisionLanguageModel(
        build_model(CONFIG, TOKENIZER), CONFIG, TOKENIZER, torch.device("cpu")
    )
    model.save(HEALTHY_MODEL)
    artefacts = [
        artefact
        for make in (
            shard_artefacts,
            spec_artefacts,
            checkpoint_artefacts,
            model_artefacts,
            yaml_artefacts,
        )
        for artefact in make()
    ]
    healthy = write_checkpoint(
        FOLDER / "healthy",
        {"model.safetensors": safetensors({"a": tensor([1], 0, 4)}, bytes(4)), "state.json": b"{}"},
    )
    for read, thing in (  # whatever Python imports at the first call
        (read_shards, write_tar("good.tar", GOOD)),
        (read_shards, "*.nothing"),
        (read_checkpoint, healthy),
        (read_model, HEALTHY_MODEL),
        (load_config, "tiny"),
        *((read, thing) for name, read, thing in artefacts if name in WARM_UP),
    ):
        attempt(read, thing)
    MARKER.unlink(missing_ok=True)
    sys.addaudithook(hook)
    results = {name: attempt(read, thing) for name, read, thing in artefacts}
    control = {
        name: attempt(stock_decoder, FOLDER / f"pyd-{name}.tar") for name in ("os.system", "exec")
    }
    print(json.dumps({"results": results, "control": control}))


WARM_UP = ("model, a wrong shape", "checkpoint, a hole", "config, nested", "suite, nested")

if __name__ == "__main__":
    main()
