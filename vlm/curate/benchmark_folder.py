"""Folders in CLIP_benchmark's WebDataset layout: their shards, class names and templates.

    FOLDER/classnames.txt
    FOLDER/zeroshot_classification_templates.txt
    FOLDER/test/nshards.txt
    FOLDER/test/0.tar, 1.tar, ...       an image and a .cls, the number of its class, a sample

Both FOLDER, which means its test split, and the folder of a split (FOLDER/train) are DATA.
"""

from pathlib import Path

from vlm.errors import DataError

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_NUM_SHARDS = "nshards.txt"


def benchmark_shards(folder: Path) -> list[str] | None:
    """The shards of a folder in this layout, by name; None for any other folder.

    Raises:
        DataError: `nshards.txt` holds no number.
    """
    split = _split(folder)
    if split is None:
        return None
    text = (split / _NUM_SHARDS).read_bytes().strip()
    if not text.isdigit() or not int(text):
        raise DataError(f"{split / _NUM_SHARDS}: must hold the number of shards, from 1")
    return [str(split / f"{number}.tar") for number in range(int(text))]


def benchmark_text(data: str | list[str], name: str) -> Path | None:
    """The file `CLASS_NAMES` or `TEMPLATES` that belongs to DATA; None where there is none."""
    folders = [data] if isinstance(data, str) else data
    split = _split(Path(folders[0]).expanduser()) if len(folders) == 1 else None
    path = None if split is None else split.parent / name
    return path if path is not None and path.is_file() else None


def _split(folder: Path) -> Path | None:
    """The folder of the split that a folder means."""
    return next((s for s in (folder / "test", folder) if (s / _NUM_SHARDS).is_file()), None)
