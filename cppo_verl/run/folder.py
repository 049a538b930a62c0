"""A run folder: its files' names, its configuration."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CONFIG, MANIFEST = "config.yaml", "manifest.json"


def read_config(folder: str | Path) -> DictConfig:
    """The resolved configuration that a run (or an examination of one) was started with."""
    config = OmegaConf.load(Path(folder) / CONFIG)
    assert isinstance(config, DictConfig)
    return config
