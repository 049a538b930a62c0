"""The rows of the table, as overrides of ``cppo train recipe=quickstart``."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cppo_verl.config.check_settings import MODES
from cppo_verl.evaluation.validation import validations
from cppo_verl.problems import ConfigError

# Nothing is masked: a total variation is at most 1.
_NONE = ("method=dppo", "method.delta=2")

ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    # The seven methods of Table 1, and their surrogate without a trust region.
    "table1": {
        "none": _NONE,
        **{name: (f"method={name}",) for name in ("grpo", "minpro", "cispo", "dppo", "trm_max", "trm_avg")},
        "cppo": (),
    },
    # Figs. 5 and 6, as recipes/ablations.sh has them; delta_b has a group of its own.
    "ablations": {
        "no-position-weight": ("method.weights=uniform",),
        "no-prefix-budget": ("method.delta_b=null",),
        "shuffled-weights": ("method.weights=shuffled",),
        "soft-gate": ("method.soft_gate=true",),
        "w-min-0.6": ("method.w_min=0.6",),
        "kl": ("divergence=topk_kl",),
        "binary": ("divergence=binary_tv",),
        "trm-max-avg": ("method=trm_max_avg",),
    },
    "delta_b": {f"delta-b-{value}": (f"method.delta_b={value}",) for value in ("0.005", "0.03", "0.06", "0.12")},
    # How strict, rather than which rule: the token threshold, CPPO's budget in the paper's ratio to it.
    "delta": {
        **{f"dppo-delta-{value}": ("method=dppo", f"method.delta={value}") for value in ("0.015", "0.05")},
        "cppo-delta-0.015": ("method.delta=0.015", "method.delta_b=0.0015"),
        "cppo-delta-0.05": ("method.delta=0.05", "method.delta_b=0.005"),
        # What cppo calibrate begins with on the dumps of a stale cppo cell.
        "cppo-delta-0.78": ("method.delta=0.78", "method.delta_b=0.078"),
    },
    # What a kept token weighs: the geometric mean of its response's ratios in the place of its own.
    "importance": {"cppo-geometric": ("method.importance=geometric",)},
    "others": {
        name: (f"method={name}",)
        for name in ("drpo", "gspo", "gmpo", "sapo", "tis", "mis", "icepop", "m2po", "opsm", "aspo", "fipo", "vespo")
    },
}


PLAIN = "plain"


class Column(NamedTuple):
    """Under which circumstances the rows are trained."""

    lr: str
    staleness: int
    """Steps between the weights that generate and those that are trained; of an asynchronous mode its own affair."""
    on: str = PLAIN
    """The plain loop, or the whole stack in one of :data:`MODES`."""

    @property
    def name(self) -> str:
        if self.on in MODES[1:]:
            return f"lr{self.lr}-{self.on}"
        return f"lr{self.lr}-stale{self.staleness}" + ("" if self.on == PLAIN else "-stack")

    @property
    def overrides(self) -> list[str]:
        """Of ``cppo train``."""
        how = [f"mode={self.on}"] if self.on in MODES[1:] else [f"run.staleness={self.staleness}"]
        every = -1 if self.on == PLAIN else 10
        return [f"actor_rollout_ref.actor.optim.lr={self.lr}", f"trainer.save_freq={every}", *how]


class Cell(NamedTuple):
    """One training."""

    column: Column
    row: str
    seed: int

    def folder(self, root: Path) -> Path:
        """The run folder it is to have."""
        return root / self.column.name / f"{self.row}-seed{self.seed}"

    def overrides(self, root: Path, steps: int) -> list[str]:
        """Of ``cppo train``, the quickstart's batch with half its responses; dumps of the first seed."""
        rows = {name: overrides for group in ROWS.values() for name, overrides in group.items()}
        folder = self.folder(root)
        return [
            "recipe=quickstart",
            "platform=cpu",
            f"quickstart.assets='{assets(root, self.seed)}'",
            f"run.dir='{folder.parent}'",
            f"run.name={folder.name}",
            f"run.seed={self.seed}",
            f"run.dump_steps={[steps // 4, steps // 2] if self.seed == 0 else []}",
            "actor_rollout_ref.rollout.n=8",
            "actor_rollout_ref.rollout.val_kwargs.n=8",
            f"trainer.total_training_steps={steps}",
            "trainer.test_freq=5",
            *self.column.overrides,
            *rows[self.row],
        ]

    def is_done(self, root: Path, steps: int) -> bool:
        """Whether the validation after the last step is there.

        Raises:
            ConfigError: it was trained for another number of steps.
        """
        done = max(validations(self.folder(root) / "validation"), default=-1)
        too_far = done > steps or (self.column.on == PLAIN and 0 <= done < steps)
        if too_far:
            raise ConfigError(f"{self.folder(root)} is a training of {done} steps, not {steps}: give another folder")
        return done == steps


def assets(root: Path, seed: int) -> Path:
    """Where the task and the warm-started model of a seed lie."""
    return root / f"assets-{seed}"


def cells(column: Column, names: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
    """Of rows, or of whole groups of them; one seed of all before the next.

    Raises:
        KeyError: a name is neither.
    """
    known = {name for group in ROWS.values() for name in group}
    rows = [row for name in names for row in ROWS.get(name, {name: ()})]
    for row in rows:
        if row not in known:
            raise KeyError(row)
    return [Cell(column, row, seed) for seed in seeds for row in dict.fromkeys(rows)]
