"""Real tars with real pictures, made in a few lines."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MakeTar = Callable[..., Path]


def picture(number: int = 0, suffix: str = "png", size: tuple[int, int] = (8, 8)) -> bytes:
    """An encoded picture that differs from every other number's."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    formats = {"jpg": "JPEG", "jpeg": "JPEG"}
    Image.fromarray(pixels).save(buffer, formats.get(suffix, suffix.upper()))
    return buffer.getvalue()


def write_tar(
    path: Path, members: list[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeTar:
    """Writes `name` with samples given as (key, {suffix: bytes}), or a number of captioned ones."""

    def make(
        samples: list[tuple[str, Mapping[str, bytes]]] | int = 3,
        name: str = "train-0000.tar",
        **options: Any,
    ) -> Path:
        if isinstance(samples, int):
            samples = [
                (f"s{i}", {"png": picture(i), "txt": f"caption {i}".encode()})
                for i in range(samples)
            ]
        members = [
            (f"{key}.{suffix}", data) for key, fields in samples for suffix, data in fields.items()
        ]
        return write_tar(tmp_path / name, members, **options)

    return make
