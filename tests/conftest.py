"""What all tests share: the torchvision guard, and what a missing system package means."""

import shutil

import pytest
import torch

from vlm.runtime import torchvision_guard

torchvision_guard.install()
torch.set_num_threads(1)  # tests are small, and run side by side


def pytest_addoption(parser):
    parser.addoption(
        "--require-system", action="store_true", help="fail where a system package is missing"
    )


def pytest_collection_modifyitems(config, items):
    long = "long" in (config.option.markexpr or "")
    missing = "" if shutil.which("chromium") else "chromium is not installed"
    for item in items:
        if item.get_closest_marker("long") and not long:
            item.add_marker(pytest.mark.skip(reason="long form: make test-long"))
        if item.get_closest_marker("system") and missing:
            if config.option.require_system:
                raise pytest.UsageError(f"{missing}, and --require-system was given")
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
