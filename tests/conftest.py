"""What several tests of a live stack share, what makes all of them faster, and the end of the time that CI has."""

import copy
import functools
import os
import time

import omegaconf.base
import pytest
import yaml
from small_run import base_overrides, make_assets

LAST = ("test_eval.py", "test_async.py")  # whole runs, killed and resumed: the first to go where time is short


def pytest_ignore_collect(collection_path, config):
    """For the few tests that run alone not all modules, and what those import, are loaded: 9 seconds instead of 21."""
    if config.option.markexpr.endswith(" and alone") and collection_path.suffix == ".py":
        return True if "live" not in collection_path.parts and "alone" not in collection_path.read_text() else None
    return None


def pytest_collection_modifyitems(items):
    """What starts the whole stack is marked `alone`; the longest tests come last."""
    for item in items:
        if "live" in item.path.parts:
            item.add_marker("alone")
    items.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Where CI is too slow for all slow tests the last ones are skipped, by name, before the run is cut off."""
    until = os.environ.get("CPPO_TESTS_UNTIL")
    if until and time.time() > float(until) and item.get_closest_marker("slow"):
        pytest.skip("not run: the time for the tests was over (CPPO_TESTS_UNTIL)")


@pytest.fixture(scope="session", autouse=True)
def parsed_once():
    """A third of composing a configuration is parsing the same forty files and interpolations; hundreds of tests do."""
    load, files = yaml.load, {}

    def load_once(stream, Loader):
        if not hasattr(stream, "read"):
            return load(stream, Loader)
        text = stream.read()
        if (text, Loader.__name__) not in files:
            stream.seek(0)  # whose name an error tells
            files[text, Loader.__name__] = load(stream, Loader)
        return copy.deepcopy(files[text, Loader.__name__])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "load", load_once)
        patch.setattr(omegaconf.base, "parse", functools.lru_cache(maxsize=None)(omegaconf.base.parse))
        yield


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


@pytest.fixture
def nothing_starts(monkeypatch):
    """A check that lets through what it should refuse fails here, and trains nothing."""
    monkeypatch.setattr("cppo_verl.run.supervisor.start", lambda *_: pytest.fail("it was started"))
