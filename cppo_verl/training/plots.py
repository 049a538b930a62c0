"""Plots of a run folder (PNG): training curves, and the mask on one response where a step was dumped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cppo_verl.run.folder import read_config
from cppo_verl.run.log import accuracies, read_metrics
from cppo_verl.run.terminal import plain
from cppo_verl.training.dumps import dumps_of, load


def plot_run(folder: Path, say: Callable[[str], None] | None = None) -> list[Path]:
    """Write ``plots/training.png`` and, where steps were dumped, ``plots/mask.png``. Returns the files written.

    Args:
        say: is told of a last line of metrics that was cut off.
    """
    import matplotlib

    matplotlib.use("Agg")
    metrics, target = read_metrics(folder, say), folder / "plots"
    target.mkdir(exist_ok=True)
    written = [_plot_training(metrics, target / "training.png")]
    dumps = dumps_of(folder)
    if dumps:
        written += _plot_mask(dumps, folder, target / "mask.png")
    return written


def _plot_training(steps: dict[int, dict[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    _curve(axes[0, 0], steps, {"critic/score/mean": "training reward"})
    validation = {key: label for line in steps.values() for key, (label, _) in accuracies(line).items()}
    _curve(axes[0, 0], steps, validation, marker="o")
    axes[0, 0].set_title("reward and validation")
    causes = {"trust_region/masked_by_token": "token threshold", "trust_region/masked_by_prefix": "prefix budget"}
    _curve(axes[0, 1], steps, causes, scale=100)
    axes[0, 1].set(title="masked tokens by cause", ylabel="% of tokens")
    _curve(axes[1, 0], steps, {"divergence/mean": "mean", "divergence/p99": "99th percentile"})
    axes[1, 0].set(title="divergence D", yscale="log")
    quarters = {f"divergence/quarter_{number}": f"quarter {number}" for number in range(1, 5)}
    _curve(axes[1, 1], steps, quarters)
    axes[1, 1].set_title("mean divergence by position in the response")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _curve(
    axis: Any, steps: dict[int, dict[str, Any]], series: dict[str, str], scale: float = 1.0, **style: Any
) -> None:
    for key, label in series.items():
        points = [(step, line[key] * scale) for step, line in steps.items() if isinstance(line.get(key), int | float)]
        if points:
            text = plain(label).replace("$", r"\$")  # a data source's name is no formula
            axis.plot(*zip(*points, strict=True), label=text, **style)


def _plot_mask(dumps: list[Path], folder: Path, path: Path) -> list[Path]:
    """w_t D_t against the effective threshold c_t along the response with the most masked tokens."""
    import matplotlib.pyplot as plt

    from cppo_verl import core

    method = read_config(folder).method
    of_cppo = method._target_ == "cppo_verl.methods.Cppo"
    if not of_cppo or method.delta_b is None or method.weights == "shuffled" or method.soft_gate:
        return []
    dump, row = _most_masked([load(file) for file in dumps], method.delta)
    one = {name: dump[name][row : row + 1] for name in ("log_prob", "rollout_log_prob", "advantages", "divergence")}
    mask = dump["response_mask"][row : row + 1]
    weights = core.position_weights(mask, method.w_min, schedule=method.weights, horizon=method.get("horizon"))
    region = core.cppo_mask(
        one["log_prob"] - one["rollout_log_prob"],
        one["advantages"],
        one["divergence"],
        mask,
        delta=method.delta,
        weights=weights,
        delta_b=dump["delta_b"][row : row + 1],
    )
    spent, position = (weights * one["divergence"])[mask], range(1, int(mask.sum()) + 1)
    blocked = ~region.keep[mask]
    returning = region.keep[mask] & (region.token_exceeded | region.prefix_exceeded)[mask] & (spent > 0)
    by_token = blocked & region.token_exceeded[mask]
    figure, axis = plt.subplots(figsize=(10, 4), constrained_layout=True)
    axis.bar(position, spent, color="#9ecae1", label="$w_t D_t$, kept: within $c_t$")
    for chosen, colour, label in (
        (returning, "#74c476", "kept: moves back to the rollout"),
        (by_token, "#de2d26", "masked: token threshold"),
        (blocked & ~by_token, "#fd8d3c", "masked: prefix budget"),
    ):
        places = [place for place, flag in zip(position, chosen, strict=True) if flag]
        if places:
            axis.bar(places, spent[chosen], color=colour, label=label)
        for place in places:  # a masked token is to be seen however small its own divergence is
            axis.axvspan(place - 0.5, place + 0.5, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(method.delta, color="grey", linestyle=":", label=r"$\delta$")
    axis.step(position, region.threshold[mask].clamp_min(0), where="mid", color="black", label="$c_t$ (0 if negative)")
    axis.set(xlabel="token position t", ylabel="weighted divergence", title="CPPO's mask on one response")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]


def _most_masked(dumps: list[dict[str, Any]], delta: float) -> tuple[dict[str, Any], int]:
    """The dump and row that show most of the mask: both causes if possible, on tokens whose divergence is visible."""
    best, chosen = -1, (dumps[0], 0)
    for dump in dumps:
        masked = (dump["gate"] < 1) & dump["response_mask"]
        visible = masked & (dump["divergence"] > delta / 50)
        by_token, by_prefix = (visible & dump["token_cause"]).sum(-1), (visible & ~dump["token_cause"]).sum(-1)
        scores = 100 * (by_token.clamp_max(1) + by_prefix.clamp_max(1)) + by_prefix + by_token
        if int(scores.max()) > best:
            best, chosen = int(scores.max()), (dump, int(scores.argmax()))
    return chosen
