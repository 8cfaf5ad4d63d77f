"""Folders of real picture files."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakePicture = Callable[..., bytes]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_picture(tmp_path: Path) -> MakePicture:
    """Writes a picture under `tmp_path`, by default as its suffix says; returns its bytes."""

    def make(name: str, number: int = 0, form: str | None = None) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        suffix = Path(name).suffix[1:].upper()
        known = {"JPG": "JPEG", "TIF": "TIFF"}
        Image.fromarray(pixels).save(buffer, form or known.get(suffix, suffix))
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """An encoded picture of noise that differs from every other number's."""

    def encode(number: int = 0, form: str = "PNG", size: tuple[int, int] = (40, 40)) -> bytes:
        width, height = size
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        return buffer.getvalue()

    return encode


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes `name` under `tmp_path` with members given as (name, bytes)."""

    def make(members: list[tuple[str, bytes]], name: str = "a.tar") -> Path:
        with tarfile.open(tmp_path / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return make
