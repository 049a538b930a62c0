"""A run folder: its files' names, its configuration, whose it is."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from cppo_verl.problems import ConfigError
from cppo_verl.run.files import DamagedFile, read_json

CONFIG, MANIFEST = "config.yaml", "manifest.json"
COPY_BACK = "put a copy back; logs/config-N.yaml in the run folder is attempt N's"

# Of a whole configuration, whose end may be cut off between two settings.
_NODES = ("actor_rollout_ref", "data", "trainer", "method", "run")


def run_of(path: Path) -> Path | None:
    """The run folder that ``path`` is or lies in, the nearest one."""
    files = (CONFIG, MANIFEST)
    return next((folder for folder in (path, *path.parents) if all((folder / name).is_file() for name in files)), None)


def read_config(folder: str | Path) -> DictConfig:
    """The resolved configuration that a run (or an examination of one) was started with.

    Raises:
        ConfigError: it is no run folder.
        DamagedFile: its configuration is empty, cut off, no YAML mapping or lacks a part.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        raise ConfigError(f"{folder} is not a run folder (no {CONFIG})")
    text = path.read_text(errors="replace")
    if not text.strip():
        raise DamagedFile(path, 1, "is empty", COPY_BACK)
    if not text.endswith("\n"):
        raise DamagedFile(path, 1 + text.count("\n"), "is cut off", COPY_BACK)
    try:
        config = OmegaConf.load(path)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DamagedFile(path, line, f"is damaged ({error.problem})", COPY_BACK) from None
    except (YAMLError, UnicodeDecodeError):
        raise DamagedFile(path, 1, "is damaged (no text)", COPY_BACK) from None
    except (ValueError, RecursionError, OmegaConfBaseException):
        raise DamagedFile(path, 1, "is damaged (no settings)", COPY_BACK) from None
    except OSError:  # OmegaConf's for what is no mapping
        config = OmegaConf.create([])
    nodes = config if isinstance(config, DictConfig) else OmegaConf.create()
    lacking = [name for name in _NODES if not isinstance(nodes._get_node(name), DictConfig)]
    if lacking:
        raise DamagedFile(path, 1 + text.rstrip().count("\n"), f"lacks {', '.join(lacking)}", COPY_BACK)
    assert isinstance(config, DictConfig)
    return config


def read_attempts(folder: str | Path) -> list[dict[str, Any]]:
    """What each attempt of a run was made with, the first one first; none where there is no manifest.

    Raises:
        DamagedFile: the manifest cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return []
    remedy = 'put a copy back, or write {"attempts": []} into it: only the record of earlier attempts is lost'
    attempts = read_json(path, remedy, "attempts")["attempts"]
    listed = isinstance(attempts, list) and all(isinstance(attempt, dict) for attempt in attempts)
    if not listed or (attempts and not isinstance(attempts[0].get("tracking_id"), str)):
        raise DamagedFile(path, 1, "is damaged (attempts is no list of attempts)", remedy)
    return attempts


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
