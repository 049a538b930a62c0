"""Curves over training steps: one line a group of runs, with the range of its seeds as a band."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cppo_verl.figures.runs import NAMING, Group, Run, differences, names_a_group
from cppo_verl.run.log import accuracies, validation_score
from cppo_verl.run.terminal import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_DASHES = ("-", "--", ":", "-.")
Value = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: several numbers of a line of metrics, drawn for each group."""

    title: str
    values: dict[str, Value]
    """What the line is called besides its group ("" for nothing) -> the number of a step."""
    unit: str = ""
    log: bool = False
    marker: str | None = None
    of_several: tuple[str, ...] = ()
    """Which of the values are drawn where there are several groups; all of them if empty."""

    def shown(self, groups: int) -> dict[str, Value]:
        return {
            name: value
            for name, value in self.values.items()
            if groups == 1 or not self.of_several or name in self.of_several
        }

    def has_numbers(self, groups: Sequence[Group]) -> bool:
        """Whether any group has any of the values."""
        return any(group.curve(value)[0] for value in self.shown(len(groups)).values() for group in groups)


def metric(name: str, scale: float = 1.0) -> Value:
    """The number of that name, times ``scale``; None in a step without it."""

    def value(line: dict[str, Any]) -> float | None:
        found = line.get(name)
        return found * scale if isinstance(found, int | float) else None

    return value


def training_panels() -> list[Panel]:
    """Reward, length, entropy and log-prob error (Figs. 4 and 8-11)."""

    def entropy(line: dict[str, Any]) -> float | None:
        exact = metric("policy/entropy")(line)
        return metric("policy/entropy_sampled")(line) if exact is None else exact

    return [
        Panel("training reward", {"": metric("critic/score/mean")}),
        Panel("response length", {"": metric("response_length/mean")}, "tokens"),
        Panel("entropy", {"": entropy}, "nats a token"),
        Panel("log-prob error of rollout and training", {"": metric("rollout/log_prob_relative_error")}, log=True),
    ]


def trust_region_panels() -> list[Panel]:
    """What the trust region did; the prefix's share and delta_b are Fig. 7's."""
    percent, quarters = partial(metric, scale=100), ("first", "second", "third", "last")
    return [
        Panel(
            "masked tokens",
            {"token": percent("trust_region/masked_by_token"), "prefix": percent("trust_region/masked_by_prefix")},
            "% of tokens",
        ),
        Panel("masked by the prefix", {"": percent("trust_region/prefix_share")}, "% of masked tokens"),
        Panel("effective prefix budget", {"": metric("trust_region/delta_b")}, r"$\delta_b$"),
        Panel("divergence", {"mean": metric("divergence/mean"), "P99": metric("divergence/p99")}, "D", log=True),
        Panel(
            "divergence by quarter of a response",
            {name: metric(f"divergence/quarter_{number}") for number, name in enumerate(quarters, 1)},
            "mean D",
            of_several=("first", "last"),
        ),
        Panel(
            "bound on the surrogate's error, as realised",
            {"uniform": metric("bound/uniform"), "prefix": metric("bound/cppo")},
            "mean over responses",
            log=True,
        ),
        Panel("responses inside the prefix constraint", {"": percent("trust_region/inside_prefix")}, "%"),
        Panel("updates towards the rollout policy", {"": percent("trust_region/towards_rollout")}, "% of tokens"),
    ]


def validation_panels(groups: Sequence[Group]) -> list[Panel]:
    """One panel a benchmark and, of several, one of what checkpoints are compared by (Figs. 1, 4, 8-11)."""
    names = {
        key: label
        for group in groups
        for run in group.runs
        for line in run.steps.values()
        for key, (label, _) in accuracies(line).items()
    }
    panels = [
        Panel(label, {"": metric(key, 100)}, "%", marker="o")
        for key, label in sorted(names.items())
        if not label.startswith("aime_mean")
    ]
    return [*panels, mean_panel("mean")] if len(panels) > 1 else panels


def mean_panel(title: str) -> Panel:
    """The mean of the benchmarks: of AIME24, AIME25 and AIME26 where there are all three."""

    def value(line: dict[str, Any]) -> float | None:
        score = validation_score(line)
        return None if score is None else 100 * score

    return Panel(title, {"": value}, "Avg@k, %", marker="o")


def ablation_panels(groups: Sequence[Group]) -> list[tuple[Panel, list[Group]]]:
    """A panel for each setting in which groups differ from the one that all others are nearest to (Figs. 5 and 6)."""
    if len(groups) < 3:
        return []
    first = {group: group.runs[0] for group in groups}

    def distance(group: Group) -> int:
        return sum(len(differences(first[group], first[other])) for other in groups)

    # Of equally near ones CPPO, then the first.
    reference = min(groups, key=lambda group: (distance(group), first[group].method != "cppo"))
    families: dict[str, list[Group]] = {}
    for group in groups:
        if group is not reference:
            families.setdefault(_changed(first[group], first[reference]), []).append(group)
    panels = [(mean_panel(name), [reference, *members]) for name, members in families.items()]
    return panels if len(panels) > 1 else []


def _changed(run: Run, other: Run) -> str:
    """The setting by which a reader would call the difference."""
    changed = differences(run, other)
    named = [NAMING.get(key, key.removeprefix("method.")) for key in changed if names_a_group(key)]
    return (named or changed or ["run"])[0]


def draw(axis: "Axes", panel: Panel, groups: Sequence[Group], colours: dict[str, str]) -> None:
    """Draw the panel; groups have a colour, its own lines dashes (of a single group colours)."""
    values, alone = panel.shown(len(groups)), len(groups) == 1
    for group in groups:
        for place, (name, value) in enumerate(values.items()):
            steps, numbers = group.curve(value)
            if not steps:
                continue
            colour = COLOURS[place % len(COLOURS)] if alone and len(values) > 1 else colours[group.label]
            means = [float(np.mean(row)) for row in numbers]
            label = _text(name if alone else group.name if place == 0 else "")
            dashes = "-" if alone else _DASHES[place % len(_DASHES)]
            axis.plot(steps, means, color=colour, linestyle=dashes, marker=panel.marker, markersize=3, label=label)
            if len(group.runs) > 1:
                lowest, highest = [min(row) for row in numbers], [max(row) for row in numbers]
                axis.fill_between(steps, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    axis.set(title=_text(panel.title), xlabel="step", ylabel=panel.unit)
    if panel.log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if len(values) > 1:
        _explain(axis, list(values), alone)


def _text(name: str) -> str:
    """A name of a run or a data source, which is neither a formula nor anything but text."""
    return plain(name).replace("$", r"\$")


def _explain(axis: "Axes", names: Sequence[str], alone: bool) -> None:
    """A legend of the panel's own lines: by colour of a single group, by dashes of several."""
    handles = []
    for place in range(len(names)):
        colour = COLOURS[place % len(COLOURS)] if alone else "grey"
        handles += axis.plot([], [], color=colour, linestyle="-" if alone else _DASHES[place % len(_DASHES)])
    axis.legend(handles, list(names), fontsize="small")
