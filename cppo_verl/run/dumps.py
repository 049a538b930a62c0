"""The dumped steps of a run (``run.dump_steps``): one file per rank, minibatch and micro-batch."""

from pathlib import Path
from typing import Any

from cppo_verl.problems import ConfigError


def dumps_of(folder: Path) -> list[Path]:
    """The files of a run folder, the oldest first."""
    return sorted(folder.glob("dumps/step_*/minibatch*.pt"), key=lambda path: path.stat().st_mtime)


def load(file: Path) -> dict[str, Any]:
    """The tensors of one file.

    Raises:
        ConfigError: it is damaged.
    """
    import torch

    try:
        return dict(torch.load(file))
    except Exception as error:  # of whatever kind the file's first bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{file} is damaged ({reason}): move it away, the others are read without it") from None
