"""Settings files in an empty working directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.config.load import load_config
from vlm.config.schema import Config
from vlm.errors import ConfigError


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Loads the given text as `emoji.yaml` of the working directory."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str | bytes = "", overrides: Any = ()) -> Config:
        data = text.encode() if isinstance(text, str) else text
        Path("emoji.yaml").write_bytes(data)
        return load_config("emoji.yaml", overrides)

    return load_text


@pytest.fixture
def problems(load: Callable[..., Config]) -> Callable[..., list[str]]:
    """The lines of the ConfigError that loading raises."""

    def load_wrong(text: str | bytes = "", overrides: Any = ()) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, overrides)
        return caught.value.problems

    return load_wrong
