"""What ``cppo doctor`` examines, and what it says about it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cppo_verl.run.machine import joined_cluster

if TYPE_CHECKING:
    from omegaconf import DictConfig

GIB = 2**30


class Finding(NamedTuple):
    """One line: a status, what was found, and for ``warn`` and ``FAIL`` what to do."""

    status: str
    found: str
    remedy: str | None = None


def ok(found: str) -> Finding:
    return Finding("ok", found)


def skip(found: str) -> Finding:
    return Finding("skip", found)


def warn(found: str, remedy: str) -> Finding:
    return Finding("warn", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    return Finding("FAIL", found, remedy)


@dataclass(frozen=True)
class Subject:
    """What is examined: a composed configuration, and whether overrides make it a run's or it is the defaults'."""

    config: "DictConfig"
    described: bool

    @property
    def on_cpu(self) -> bool:
        return bool(self.config.trainer.device == "cpu")

    @property
    def cluster(self) -> str | None:
        """Address of the running Ray cluster that a run would join."""
        return joined_cluster(self.config.ray_kwargs.ray_init.get("address"))

    @property
    def model(self) -> str | None:
        path = self.config.actor_rollout_ref.model.path
        return None if path is None else str(path)


def readable(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / GIB:.1f} GiB" if size > 0.1 * GIB else f"{size / 2**20:.1f} MiB"
