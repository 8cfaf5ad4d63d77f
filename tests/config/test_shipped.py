import pytest

from vlm.config.find import shipped_configs
from vlm.config.load import load_config

NAMES = ["clip_vit_b32", "clip_vit_b16", "clip_vit_l14", "coca_vit_b32", "tiny", "emoji", "scenes"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_loads_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name in shipped_configs()
    config = load_config(name)
    assert (config.train.steps is None) != (config.train.epochs is None)


def test_every_shipped_config_is_tested():
    assert set(shipped_configs()) == set(NAMES)
