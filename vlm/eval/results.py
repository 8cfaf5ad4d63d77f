"""The files of an evaluation: results.json, and beside it what each task's numbers are made of."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as array_bytes

from vlm.errors import DataError
from vlm.runtime.files import write_atomic

READ = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=READ)
class Result:
    """A row of results.json."""

    task: str
    split: str
    metric: str
    value: float
    ci95: tuple[float, float]
    n: int
    chance: float
    protocol: str

    @property
    def name(self) -> str:
        """TASK-SPLIT."""
        return f"{self.task}-{self.split}"


@dataclass(frozen=True, config=READ)
class Head:
    """What every task's details begin with.

    Attributes:
        task: Its name.
        split: Its data's.
        protocol: The hash in each of its results.
        data: DATA.
        fingerprint: Of the data.
        model: `model_hash`; empty in files of earlier versions, as are the next three.
        inputs: A hash of all that the results follow from: who has it need not measure again.
        parts: What the protocol is the hash of.
        results: Its rows of results.json.
        arrays: Names of arrays in TASK-SPLIT.safetensors, by metric: see `Samples`.
    """

    task: str
    split: str
    protocol: str
    data: str | list[str]
    fingerprint: str
    model: str = ""
    inputs: str = ""
    parts: dict[str, Any] | None = None
    results: list[dict[str, Any]] | None = None
    arrays: dict[str, dict[str, str]] | None = None


class Samples(NamedTuple):
    """What a mean is the mean of, sample by sample.

    Attributes:
        scores: Of each.
        clusters: Its cluster's number.
        weights: Of each; None where all weigh the same.
    """

    scores: npt.NDArray[Any]
    clusters: npt.NDArray[Any]
    weights: npt.NDArray[Any] | None = None


def details_folder(out: Path) -> Path:
    """Where the details beside a results file are."""
    return out.with_name("eval" if out.name == "results.json" else f"{out.stem}-eval")


def read_results(path: Path) -> list[Result]:
    """The rows of a results file.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        return TypeAdapter(list[Result]).validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    except ValidationError:
        raise DataError(f"{path} holds no results") from None


def read_head(folder: Path, name: str) -> Head | None:
    """What the details of a task say of it; None where there are none that can be read."""
    try:
        return TypeAdapter(Head).validate_json((folder / f"{name}.json").read_bytes())
    except (OSError, ValidationError):
        return None


def read_samples(folder: Path, head: Head, metric: str) -> Samples | None:
    """The scores of a metric, sample by sample; None where they were not kept.

    Raises:
        DataError: The file is damaged.
    """
    names = (head.arrays or {}).get(metric)
    path = folder / f"{head.task}-{head.split}.safetensors"
    if names is None or not path.is_file():
        return None
    try:
        arrays = load_arrays(path.read_bytes())
        return Samples(**{part: arrays[name] for part, name in names.items()})
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged: {error}; remove it and measure again") from error


def write_task(
    folder: Path, head: Head, samples: dict[str, Samples], details: dict[str, Any]
) -> None:
    """The files of a finished task: the arrays first, for the JSON says that it is finished.

    Raises:
        DiskError: They cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    names: dict[str, dict[str, str]] = {}
    for metric, of_metric in samples.items():
        parts = {k: _smallest(v) for k, v in of_metric._asdict().items() if v is not None}
        names[metric] = {part: _name(array) for part, array in parts.items()}
        arrays |= {_name(array): array for array in parts.values()}  # metrics share clusters
    stem = f"{head.task}-{head.split}"
    if arrays:
        write_atomic(folder / f"{stem}.safetensors", array_bytes(arrays))
    values = {**asdict(head), "arrays": names}
    assert not values.keys() & details.keys(), "these names are taken"
    write_json(folder / f"{stem}.json", {**values, **details})


def write_json(path: Path, values: Any) -> None:
    """A JSON file for people and programs.

    Raises:
        DiskError: It cannot be written.
    """
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode())


def primary(results: Sequence[Result]) -> dict[str, Result]:
    """The first result of each TASK-SPLIT."""
    firsts: dict[str, Result] = {}
    for result in results:
        firsts.setdefault(result.name, result)
    return firsts


def _smallest(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same numbers in the smallest type that holds them exactly."""
    for kind in (np.uint8, np.int32, np.float32):
        with np.errstate(invalid="ignore"):
            small = values.astype(kind)
        if np.array_equal(small, values):
            return np.ascontiguousarray(small)
    return np.ascontiguousarray(values)


def _name(array: npt.NDArray[Any]) -> str:
    """Of its content, so that equal ones are kept once."""
    digest = hashlib.sha256(str((array.dtype, array.shape)).encode() + array.tobytes())
    return digest.hexdigest()[:12]
