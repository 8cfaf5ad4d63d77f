"""Which file a config's name stands for."""

from pathlib import Path

import pytest

from vlm.config import find
from vlm.config.find import find_config, find_suite, shipped_configs
from vlm.errors import ConfigError


@pytest.fixture(params=["shipped_configs", "../configs"])
def shipped(request, tmp_path, monkeypatch):
    """An installed package: as the wheel lays it out, or as a checkout does."""
    package = tmp_path / "site" / "vlm"
    (package / "config").mkdir(parents=True)
    monkeypatch.setattr(find, "__file__", str(package / "config" / "find.py"))
    folder = package / request.param
    folder.mkdir()
    for name in ("clip_vit_b32", "emoji"):
        (folder / f"{name}.yaml").touch()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return folder.resolve()


def test_a_bare_name_finds_the_shipped_config(shipped):
    assert shipped_configs() == ["clip_vit_b32", "emoji"]
    assert find_config("emoji").resolve() == shipped / "emoji.yaml"


def test_the_working_directory_comes_before_the_shipped_configs(shipped):
    Path("configs").mkdir()
    Path("configs/emoji.yaml").touch()
    assert find_config("emoji") == Path("configs/emoji.yaml")
    Path("emoji").touch()
    assert find_config("emoji") == Path("emoji")
    assert find_config(Path("configs/emoji.yaml")) == Path("configs/emoji.yaml")


def test_a_bare_name_finds_a_shipped_suite_and_an_unknown_one_lists_them(shipped):
    (shipped / "suites").mkdir()
    (shipped / "suites/emoji.yaml").touch()
    assert find_suite("emoji").resolve() == shipped / "suites/emoji.yaml"
    with pytest.raises(ConfigError) as caught:
        find_suite("emojy.yaml")
    assert caught.value.problems == [
        'no suite "emojy.yaml": not a file, and no shipped suite has that name; '
        "did you mean emoji? shipped: emoji"
    ]
    Path("configs/suites").mkdir(parents=True)
    Path("configs/suites/emoji.yaml").touch()
    assert find_suite("emoji") == Path("configs/suites/emoji.yaml")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("clip_vitb32", " did you mean clip_vit_b32?"),
        ("some/emojis.yaml", " did you mean emoji?"),
        ("zzz", ""),
        ("../configs/emoj", " did you mean emoji?"),
        ("", ""),
    ],
)
def test_an_unknown_name_lists_what_is_shipped_and_the_nearest(shipped, name, meant):
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    assert caught.value.problems == [
        f'no config "{name}": not a file, and no shipped config has that name;{meant} '
        "shipped: clip_vit_b32, emoji"
    ]


def test_folders_devices_and_impossible_names_are_no_configs(shipped):
    Path("folder").mkdir()
    for name in ("folder", "/dev/zero", "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="not a file"):
            find_config(name)
