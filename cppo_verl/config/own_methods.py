"""Methods of other packages: ``method=NAME`` by an entry point of the group ``cppo_verl.methods``.

The entry point names the class. Its settings are ``NAME.yaml`` beside the class's module, as in ``configs/method/``,
or, without such a file, the dataclass's own defaults.
"""

import sys
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cppo_verl.problems import ConfigError

GROUP = "cppo_verl.methods"


def names() -> list[str]:
    """Those that are installed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def register(name: str) -> bool:
    """Give Hydra the settings of such a method; False where there is none of that name.

    Raises:
        ConfigError: its class or its settings cannot be had.
    """
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is not None:
        ConfigStore.instance().store(group="method", name=name, node=OmegaConf.create(_settings(found)))
    return found is not None


def _settings(point: EntryPoint) -> dict[str, Any]:
    where = f"method={point.name}: its entry point {point.value}"
    try:
        method = point.load()
    except Exception as error:  # of the module, which is anybody's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where} cannot be loaded: {reason}") from None
    if not isinstance(method, type) or not is_dataclass(method):
        raise ConfigError(f"{where} is no dataclass of settings (docs/adding_a_method.md)")
    file = Path(str(sys.modules[method.__module__].__file__)).with_name(f"{point.name}.yaml")
    if file.exists():
        try:
            written = OmegaConf.to_container(OmegaConf.load(file))
        except (OSError, YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"method={point.name}: {file}: {str(error).splitlines()[0]}") from None
    else:
        written = {field.name: field.default if field.default is not MISSING else "???" for field in fields(method)}
    if not isinstance(written, dict):
        raise ConfigError(f"method={point.name}: {file} holds no settings")
    target = f"{method.__module__}.{method.__qualname__}"
    return {"_target_": target, **{str(key): value for key, value in written.items()}, "name": point.name}
