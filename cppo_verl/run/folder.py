"""A run folder: its files' names, its configuration, whose it is."""

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CONFIG, MANIFEST = "config.yaml", "manifest.json"


def read_config(folder: str | Path) -> DictConfig:
    """The resolved configuration that a run (or an examination of one) was started with."""
    config = OmegaConf.load(Path(folder) / CONFIG)
    assert isinstance(config, DictConfig)
    return config


def foreign(folder: Path, made_as: str | Path | None) -> str | None:
    """Why what lies in ``folder`` may be somebody else's; None where this user owns it and it was made there.

    Args:
        made_as: the folder that its own files name; None: they name none.
    """
    if folder.stat().st_uid != os.geteuid():
        return f"belongs to another user (uid {folder.stat().st_uid})"
    if made_as is None:
        return "does not say where it was made"
    return None if Path(made_as).resolve() == folder.resolve() else f"was made as {made_as}"
