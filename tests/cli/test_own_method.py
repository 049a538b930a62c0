"""``method=NAME`` of an installed package: found by its entry point, refused where it cannot be had."""

import own_method
import pytest
from hydra.utils import instantiate

from cppo_verl.config.compose import compose
from cppo_verl.config.validate import validate
from cppo_verl.problems import ConfigError

OVERRIDES = ("platform=cpu", "method=running_max")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """``installed(...)`` writes the package and puts it where Python looks."""

    def install(**changes):
        monkeypatch.syspath_prepend(own_method.install(tmp_path / "site", **changes))

    yield install
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "my_methods"]:
        del sys.modules[name]


def test_its_settings_come_from_the_file_beside_it(installed):
    installed()
    config = compose(OVERRIDES)
    assert dict(config.method) == {"_target_": "my_methods.running.RunningMax", "name": "running_max", "delta": 0.15}
    assert instantiate(config.method).ratio_cap == 20.0
    assert compose([*OVERRIDES, "method.delta=0.3"]).method.delta == 0.3
    assert compose([*OVERRIDES, "divergence=topk_kl"]).method.delta == 0.05  # what the file refers to


def test_without_a_file_they_are_the_classes_own(installed, live_assets, tmp_path):
    installed(settings=None)
    base = ["recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}", "run.name=new"]
    config = compose([*OVERRIDES, *base, "method.delta=0.2"])
    assert config.method.ratio_cap == 20.0
    validate(config)
    with pytest.raises(ConfigError, match=r"method\.delta"):
        validate(compose([*OVERRIDES, *base]))
    with pytest.raises(ConfigError, match=r"method\.delta must be > 0; got -1\.0"):
        validate(compose([*OVERRIDES, *base, "method.delta=-1.0"]))


def test_a_file_may_build_on_ours(installed):
    installed(settings="defaults:\n  - base/ratio_cap@_here_\n  - _self_\ndelta: 0.4\n")
    assert instantiate(compose(OVERRIDES).method).ratio_cap == 20.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"module": "import no_such_module"}, "cannot be loaded: No module named 'no_such_module'"),
        ({"module": "RunningMax = 3"}, "is no dataclass of settings"),
        ({"module": "class RunningMax: pass"}, "is no dataclass of settings"),
        ({"settings": "- a list"}, "holds no settings"),
        ({"settings": "delta: ["}, "running_max.yaml: while parsing"),
    ],
)
def test_refused_with_a_reason(installed, changes, expected):
    installed(**changes)
    with pytest.raises(ConfigError) as caught:
        compose(OVERRIDES)
    assert str(caught.value).startswith("method=running_max: ")
    assert expected in str(caught.value)


def test_an_unknown_name_lists_ours_and_theirs(installed):
    installed()
    with pytest.raises(
        ConfigError, match=r"method=nothing: there is no such method; choose one of .*cppo.*running_max"
    ):
        compose(["platform=cpu", "method=nothing"])


def test_ours_cannot_be_replaced(installed):
    installed(name="dppo")
    assert compose(["platform=cpu", "method=dppo"]).method._target_ == "cppo_verl.methods.Dppo"
