"""docs/adding_a_method.md, block by block: the class, its test, the dry run and its refusals."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import own_method
import pytest
import yaml
from hydra.utils import instantiate

from cppo_verl.cli import main
from cppo_verl.config.compose import compose

PAGE = (Path(__file__).parents[2] / "docs" / "adding_a_method.md").read_text()


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's two files, where Python looks."""
    names = re.findall(r"`((?:test_)?my_methods\.py)`:", PAGE)
    assert names == ["my_methods.py", "test_my_methods.py"]
    for name, text in zip(names, blocks("python"), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_methods", "test_my_methods"):
        sys.modules.pop(name, None)


def dry_run(live_assets, tmp_path, *more):
    """Section 3's command with this test's model and data."""
    command = next(text for text in blocks("bash") if "--dry-run" in text).replace("\\\n", " ").splitlines()[-1]
    words = shlex.split(command)
    words = [f"quickstart.assets={live_assets}" if word.startswith("quickstart.assets=") else word for word in words]
    return main([*words[1:], f"run.dir={tmp_path}", *more])


def test_its_test_passes(folder):
    module = importlib.import_module("test_my_methods")
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_the_dry_run_prints_what_the_page_shows(folder, live_assets, tmp_path, capsys):
    assert dry_run(live_assets, tmp_path) == 0
    printed = "".join(capsys.readouterr())
    shown = next(text for text in blocks("text") if text.startswith("method:")).split("...\n")
    for part in shown:
        assert part in printed


def test_the_refusals_are_the_pages(folder, live_assets, tmp_path, capsys):
    shown = next(text for text in blocks("text") if "Key 'importance'" in text).splitlines()
    for more in (["method.delta=-1.0"], ["+method.importance=token"], ["~method.ratio_cap"]):
        assert dry_run(live_assets, tmp_path, *more) == 2
        assert capsys.readouterr().err.strip() in shown


def test_the_file_of_settings_composes(tmp_path, monkeypatch):
    text = next(text for text in blocks("yaml") if "RunningMax" in text)
    assert yaml.safe_load(text)["name"] == "running_max"
    settings = text.replace("_target_: cppo_verl.methods.RunningMax\n", "").replace("name: running_max\n", "")
    monkeypatch.syspath_prepend(own_method.install(tmp_path / "site", settings=settings))
    config = compose(["platform=cpu", "method=running_max"])
    assert instantiate(config.method).ratio_cap == 20.0
    assert config.method.delta == 0.15
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_methods"]:
        del sys.modules[name]
