"""Which tasks of an evaluation are finished: what they follow from, and what is there already."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vlm.curate.benchmark_folder import CLASS_NAMES, TEMPLATES, benchmark_text
from vlm.errors import DataError
from vlm.eval.card import is_card
from vlm.eval.results import Head, details_folder, read_head, read_results, write_task
from vlm.eval.source import VERSION, Outcome
from vlm.eval.tasks import Task
from vlm.inference import VisionLanguageModel
from vlm.runtime.files import sha256_file
from vlm.runtime.version import installed_version

Record = dict[str, Any]  # a row of results.json


def model_hash(model: VisionLanguageModel) -> str:
    """Sha256 over the weights by name, the architecture, the preprocessing and the tokenizer."""
    about = [asdict(model.config), asdict(model.preprocess), model.tokenizer.to_json()]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(model.model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def inputs_hash(task: Task, model: str, fingerprints: Sequence[str]) -> str:
    """Of all that a task's results follow from: who has it need not measure again.

    Args:
        task: Its settings; files that they name, or that lie in a CLIP_benchmark folder, count by
            their bytes.
        model: From `model_hash`.
        fingerprints: Of the data, and of other data that the task reads.
    """
    settings = {**asdict(task), "data": list(fingerprints)}
    files = {text: sha256_file(Path(text)) for text in _texts(settings) if os.path.isfile(text)}
    for name in (CLASS_NAMES, TEMPLATES):
        if path := benchmark_text(task.data, name):
            files[name] = sha256_file(path)
    parts = {
        "settings": settings,
        "files": files,
        "model": model,
        "version": VERSION,
        "vlm": installed_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find(folder: Path, task: Task, inputs: str) -> Head | None:
    """A task's head, if it was measured from these inputs."""
    head = read_head(folder, task.name)
    return head if head is not None and head.results and head.inputs == inputs else None


def keep(folder: Path | None, head: Head, outcome: Outcome) -> None:
    """Write what a task measured, so that it need not be measured again.

    Raises:
        DiskError: It cannot be written.
    """
    if folder is not None:
        samples = {row.metric: row.samples for row in outcome.rows if row.samples is not None}
        write_task(folder, head, samples, outcome.details)


def why_not(out: Path, model: VisionLanguageModel, tasks: list[Task]) -> str | None:
    """Why a file's results are not to be replaced by those of these tasks; None if they may be."""
    card = out.with_suffix(".md")
    if card == out:
        return f"{out} is where the fragment of a model card goes; give a .json"
    if card.exists() and not is_card(card):
        return f"{card} is no fragment of a model card that vlm eval wrote"
    if not out.exists():
        return None
    try:
        rows = read_results(out)
    except DataError as error:
        return str(error)
    digest = model_hash(model)
    for name in dict.fromkeys(row.name for row in rows):
        head = read_head(details_folder(out), name)
        if head is None or head.model != digest:
            return f"{out} holds results of another model, or of an earlier version"
        if name not in {task.name for task in tasks}:
            return f"{out} holds results of {name}, which the suite has not"
    return None


def _texts(values: Any) -> list[str]:
    """All texts among settings, however deep."""
    if isinstance(values, str):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [text for value in values for text in _texts(value)] if isinstance(values, list) else []
