"""The wheel in an empty folder: a user's table, a shipped config, a model that classifies."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm.curate.source

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the wheel is installed, away from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("vlm-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """200 pictures and a CSV, as a user would have them."""
    folder = tmp_path_factory.mktemp("user")
    emoji = f"{REPOSITORY}/datasets/emoji/val_artist-*.tar"
    dataset = vlm.curate.source.open_data(emoji, log=lambda _: None)
    (folder / "pictures").mkdir()
    with (folder / "photos.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "title"])
        for number in range(200):
            sample = dataset.read(number)
            (folder / f"pictures/{number}.webp").write_bytes(sample.image)
            table.writerow([f"pictures/{number}.webp", sample.captions[0]])
    return folder


def test_the_wheel_trains_on_a_table_and_classifies_with_the_result(site, photos, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path)}

    def vlm(*words):
        command = [sys.executable, "-m", "vlm", *words]
        done = subprocess.run(command, cwd=photos, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import vlm; print(vlm.__file__)"]
    found = subprocess.run(where, cwd=photos, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(site))
    short = ["train.epochs=1.0", "data.num_workers=0", "optim.warmup_steps=2"]
    out = vlm("train", "tiny", "data.train=photos.csv", *short)
    assert 'photos.csv: image column "file", caption column "title"' in out
    assert "step 4/4" in out
    table = vlm("classify", "runs/tiny", "pictures", "--labels", "cat,pizza,rocket")
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 200
    assert {row["label"] for row in rows} <= {"cat", "pizza", "rocket"}
    assert (photos / "runs/tiny/report.html").stat().st_size > 1000
