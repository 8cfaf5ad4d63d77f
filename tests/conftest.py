"""What all tests share: the torchvision guard, and what a missing system package means."""

import shutil

import pytest
import torch

from vlm.runtime import torchvision_guard

torchvision_guard.install()
SYSTEM = ("chromium", "strace")  # what `@pytest.mark.system` needs, if it does not say
torch.set_num_threads(1)  # tests are small, and run side by side


def pytest_addoption(parser):
    parser.addoption(
        "--require-system", action="store_true", help="fail where a system package is missing"
    )


def pytest_collection_modifyitems(config, items):
    long = "long" in (config.option.markexpr or "")
    for item in items:
        if item.get_closest_marker("long") and not long:
            item.add_marker(pytest.mark.skip(reason="long form: make test-long"))
        system = item.get_closest_marker("system")
        missing = [p for p in (system.args or SYSTEM) if not shutil.which(p)] if system else []
        if missing:
            reason = f"{' and '.join(missing)} not installed"
            if config.option.require_system:
                raise pytest.UsageError(f"{reason}, and --require-system was given")
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
