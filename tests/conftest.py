"""What several tests of a live stack share."""

import pytest
from small_run import base_overrides, make_assets


@pytest.fixture(scope="session")
def live_assets(tmp_path_factory):
    """A random tiny Qwen3 and two small arithmetic files."""
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def live_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "live"


@pytest.fixture(scope="module")
def live_base(live_assets, live_folder):
    return [*base_overrides(live_assets), f"run.dir={live_folder.parent}", f"run.name={live_folder.name}"]
