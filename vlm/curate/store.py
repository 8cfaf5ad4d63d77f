"""A folder for index files: on this machine, or at any URL that fsspec writes to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, DiskError
from vlm.runtime.files import write_atomic


@dataclass(frozen=True)
class Store:
    """A folder; a file in it is whole or absent, as object stores keep it by themselves.

    Attributes:
        place: Path or URL of the folder.
    """

    place: str

    @property
    def folder(self) -> Path | None:
        """The folder, if it is on this machine."""
        return None if "://" in self.place else Path(self.place).expanduser()

    def file(self, name: str) -> Path:
        """The path or URL of a file, to be named."""
        return (self.folder or Path(self.place)) / name

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is none.

        Raises:
            ConfigError: Nothing can be written to such a URL.
            DiskError: It cannot be read.
        """
        try:
            if self.folder is not None:
                return (self.folder / name).read_bytes()
            system, root = self._remote()
            found: bytes = system.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DiskError(f"{self.place}/{name}: cannot be read: {error}") from error
        return found

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file, and makes the folder if there is none.

        Raises:
            ConfigError: Nothing can be written to such a URL.
            DiskError: It cannot be written.
        """
        if self.folder is not None:
            write_atomic(self.folder / name, content)
            return
        system, root = self._remote()
        try:
            system.makedirs(root, exist_ok=True)
            system.pipe_file(f"{root}/{name}", content)
        except (OSError, NotImplementedError) as error:
            raise DiskError(f"{self.place}/{name}: cannot be written: {error}") from error

    def _remote(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            system, root = url_to_fs(self.place)
        except (ImportError, ValueError) as error:  # each names what is missing or unknown
            raise ConfigError(f"{self.place}: {error}") from error
        return system, root.rstrip("/")
