"""A run folder: its files' names, its configuration."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cppo_verl.problems import ConfigError

CONFIG, MANIFEST = "config.yaml", "manifest.json"


def read_config(folder: str | Path) -> DictConfig:
    """The resolved configuration that a run (or an examination of one) was started with.

    Raises:
        ConfigError: it is damaged.
    """
    path = Path(folder) / CONFIG
    try:
        config = OmegaConf.load(path)
    except (ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, DictConfig) or not isinstance(config.get("actor_rollout_ref"), DictConfig):
        raise ConfigError(f"{path} is not the configuration of a run: it has no actor_rollout_ref")
    return config
