"""Finished or growing runs, those that differ in their seed alone together, and a name for each such group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cppo_verl.problems import ConfigError
from cppo_verl.run.folder import read_config
from cppo_verl.run.log import METRICS, read_metrics
from cppo_verl.run.terminal import plain

# What may differ between the seeds of one setting: which run it is, where it lies, how long it is and what it keeps.
_OF_THE_RUN = (
    *("run.name", "run.dir", "run.seed", "run.resume", "run.dump_steps", "run.inspect_every", "run.inspect_tokens"),
    *("run.stall_minutes", "smollm2", "quickstart", "thresholds"),
    *("trainer.default_local_dir", "trainer.experiment_name", "trainer.project_name", "trainer.logger"),
    *("trainer.validation_data_dir", "trainer.rollout_data_dir", "trainer.save_freq", "trainer.test_freq"),
    *("trainer.total_training_steps", "trainer.total_epochs", "trainer.max_actor_ckpt_to_keep"),
    *("trainer.max_critic_ckpt_to_keep", "trainer.resume_mode", "trainer.log_val_generations", "ray_kwargs"),
)
# Settings whose differences name a group, before any others; how each is written.
NAMING = {
    "trainer.v1.trainer_mode": "mode",
    "run.staleness": "staleness",
    "actor_rollout_ref.actor.optim.lr": "lr",
    "actor_rollout_ref.rollout.n": "n",
    "data.train_batch_size": "prompts",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "minibatch",
}


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder, read once."""

    folder: Path
    config: DictConfig
    steps: dict[int, dict[str, Any]]
    """Step -> its metrics."""

    @classmethod
    def read(cls, folder: Path, say: Callable[[str], None] | None = None) -> "Run":
        """
        Args:
            say: is told of a last line of metrics that was cut off.

        Raises:
            ConfigError: it is no run folder.
        """
        if not (folder / METRICS).exists():
            raise ConfigError(f"{folder} is not a run folder (no {METRICS})")
        return cls(folder, read_config(folder), read_metrics(folder, say))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting that decides what is trained, by its dotted name; of a path its last part."""
        flat = _flat(OmegaConf.to_container(self.config, resolve=True))
        # What verl is handed of the method's own node says nothing new.
        skipped = (*_OF_THE_RUN, "actor_rollout_ref.actor.policy_loss", "actor_rollout_ref.rollout.trace")
        return {
            key: value.rpartition("/")[2] if isinstance(value, str) else value
            for key, value in flat.items()
            if not any(key == name or key.startswith(f"{name}.") for name in skipped) and not key.endswith(".seed")
        }

    @property
    def method(self) -> str:
        return str(self.config.method.get("name", "method"))

    @property
    def model(self) -> str:
        """The last part of the model's path or hub id."""
        return Path(str(OmegaConf.select(self.config, "actor_rollout_ref.model.path"))).name


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of the same settings: its seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The label, with the number of seeds where there are several."""
        return f"{self.label} ({len(self.runs)} runs)" if len(self.runs) > 1 else self.label

    def curve(self, value: Callable[[dict[str, Any]], float | None]) -> tuple[list[int], list[list[float]]]:
        """Steps at which every run has a number, and the numbers of the runs at each."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for step, line in run.steps.items():
                if (number := value(line)) is not None:
                    found.setdefault(step, []).append(number)
        complete = {step: numbers for step, numbers in sorted(found.items()) if len(numbers) == len(self.runs)}
        return list(complete), list(complete.values())


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by settings, in the order given. A group is called by its method and by what else tells it from others."""
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if group[0].settings == run.settings), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    labels = _labels([group[0] for group in groups])
    return [Group(label, tuple(group)) for label, group in zip(labels, groups, strict=True)]


def differences(run: Run, other: Run) -> list[str]:
    """Settings of ``run`` that ``other`` does not have with the same value; of another method its name alone."""
    keys = [key for key, value in run.settings.items() if other.settings.get(key, ...) != value]
    keys += [key for key in other.settings if key not in run.settings]
    if run.method != other.method:
        return ["method", *(key for key in keys if not key.startswith(("method.", "divergence.")))]
    return keys


def names_a_group(key: str) -> bool:
    """Whether a setting is one that a reader would call a run by."""
    return key in NAMING or (key.startswith(("method.", "divergence.")) and not key.endswith("_target_"))


def _labels(firsts: Sequence[Run]) -> list[str]:
    labels = []
    for run in firsts:
        rivals = [other for other in firsts if other is not run]
        of_method = {
            key: key.removeprefix("method.")
            for other in rivals
            if other.method == run.method
            for key in differences(run, other)
            if key not in NAMING and names_a_group(key)
        }
        naming = {
            key: short
            for key, short in NAMING.items()
            if any(run.settings.get(key) != other.settings.get(key) for other in rivals)
        }
        words = [f"{short}={_text(run.settings.get(key))}" for key, short in (of_method | naming).items()]
        if len({other.model for other in firsts}) > 1:
            words.append(run.model)
        labels.append(plain(" ".join([run.method, *words])))
    # What no naming setting tells apart: the folder's name does.
    return [label if labels.count(label) == 1 else f"{label} [{run.folder.name}]" for label, run in
            zip(labels, firsts, strict=True)]  # fmt: skip


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
