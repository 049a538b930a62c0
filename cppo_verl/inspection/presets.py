"""The methods that the page can compare: the run's own, and all others at their defaults."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.config.compose import choices, config_dir
from cppo_verl.problems import ConfigError

# Classes that web/mask.js computes; of others it shows what training did.
COMPUTED = ("Cppo", "Dppo", "Trm", "Grpo", "Cispo", "MinPro")


def presets(config: DictConfig) -> list[dict[str, Any]]:
    """``name``, ``kind`` (the class, or "Trained") and ``settings`` of each method, the run's own first.

    Others are those that the page can compute.

    Raises:
        ConfigError: the run's configuration lacks what the defaults refer to.
    """
    own, *others = map(_method, settings_of_all(config))
    return [own, *(method for method in others if method["kind"] != "Trained")]


def settings_of_all(config: DictConfig) -> list[dict[Any, Any]]:
    """Settings of the run's own method, then of all others at their defaults with the run's thresholds."""
    own = OmegaConf.to_container(config.method, resolve=True)
    assert isinstance(own, dict)
    return [own, *(_defaults(name, config) for name in sorted(choices("method")) if name != own["name"])]


def _method(settings: dict[Any, Any]) -> dict[str, Any]:
    # JSON has no infinity, which a threshold that never binds may be.
    values = {key: "Infinity" if value == math.inf else value for key, value in settings.items()}
    kind = settings["_target_"].rpartition(".")[2]
    if kind not in COMPUTED or settings.get("length_reference") is not None:
        kind = "Trained"
    return {"name": settings["name"], "kind": kind, "settings": values}


def _defaults(name: str, config: DictConfig) -> dict[Any, Any]:
    """``configs/method/<name>.yaml`` over the files that it names, with this run's thresholds."""
    nodes = {key: config.get(key) for key in ("divergence", "thresholds", "data")}
    try:
        whole = OmegaConf.create({"method": _file(name), **nodes})
        settings = OmegaConf.to_container(whole.method, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"config.yaml of the run lacks what method={name} needs ({reason}): put it back") from None
    assert isinstance(settings, dict)
    return settings


def _file(name: str) -> dict[Any, Any]:
    content = OmegaConf.to_container(OmegaConf.load(config_dir() / "method" / f"{name}.yaml"))
    assert isinstance(content, dict)
    bases = [base for base in content.pop("defaults", []) if isinstance(base, str) and base.endswith("@_here_")]
    settings: dict[Any, Any] = {}
    for base in bases:
        parent = base.removesuffix("@_here_")
        settings |= _file(parent if "/" in parent or "/" not in name else f"{name.rpartition('/')[0]}/{parent}")
    return settings | content
