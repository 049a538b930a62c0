"""``cppo calibrate``: what delta and delta_b would mask, by the divergences of dumped steps, and where to begin."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from cppo_verl import core
from cppo_verl.problems import ConfigError
from cppo_verl.run.dumps import dumps_of, load
from cppo_verl.run.folder import read_config
from cppo_verl.run.terminal import console, say

# The paper's ratio of delta to a fixed delta_b (0.15 / 0.015): what ten average tokens may spend one may spend alone.
RATIO = 10.0
# Where the search for a budget begins: below it nothing is told from rounding.
_LEAST = 1e-6
STEPS_OF_GRID = (0.25, 0.5, 1.0, 2.0, 4.0)
QUANTILES = (0.5, 0.9, 0.99, 0.999)


class Share(NamedTuple):
    """Masked tokens of all valid ones, and those that the prefix budget alone rejects."""

    masked: float
    by_prefix: float


class Suggestion(NamedTuple):
    delta: float
    delta_b: float
    reason: str


def calibrate(run: Path, w_min: float | None, share: float, as_json: bool) -> int:
    """Print quantiles of D, the mismatch floor, a table of masked shares and a suggestion; returns the exit status.

    Args:
        share: of the tokens that the suggested budgets are to mask.

    Raises:
        ConfigError: it is no run, has no dumped step, or not one valid token in it.
    """
    if w_min == 0:
        raise ConfigError("--w-min=0: the last token's weight must be above 0")
    if share == 0:
        raise ConfigError("--share=0: a budget that masks nothing is none (method.delta_b=null)")
    config, files = read_config(run), dumps_of(run)
    if not files:
        raise ConfigError(f"{run} has no dumped step; train a few with run.dump_steps=[1,2,3]")
    if w_min is None:
        w_min = float(config.method.get("w_min") or 0.8)
    batches = [(load(file), _minibatch(file)) for file in files]
    found = describe(batches)
    dumps = [batch for batch, _ in batches]
    hint = suggest(dumps, found["floor"], share, w_min)
    deltas, budgets = ([value * factor for factor in STEPS_OF_GRID] for value in (hint.delta, hint.delta_b))
    grid = [[masked(dumps, delta, budget, w_min) for budget in (*budgets, None)] for delta in deltas]
    record = {
        **{"run": str(run), "divergence": config.divergence.name, "w_min": w_min, **found},
        "top_k": top_k(dumps),
        **{"suggestion": hint._asdict(), "delta": deltas, "delta_b": [*budgets, None]},
        "masked": [[share._asdict() for share in row] for row in grid],
    }
    if as_json:
        say(json.dumps(record, indent=2))
    else:
        _show(record, grid)
    return 0


def describe(batches: Sequence[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """Tokens, quantiles of D over all of them, means by age, and the floor; (dump, its minibatch) each.

    The floor is D where pi is mu: tokens of age 0 in a step's first minibatch. What it holds is the mismatch of the two
    engines, which no budget should be below. None where a step has no such tokens.
    """
    divergence, age, first = [], [], []
    for batch, minibatch in batches:
        valid = batch["response_mask"]
        divergence.append(batch["divergence"][valid].double())
        ages = batch.get("age")
        age.append(torch.zeros_like(divergence[-1]) if ages is None else ages[valid].double())
        first.append(torch.full_like(divergence[-1], minibatch == 0))
    d, a, f = torch.cat(divergence), torch.cat(age), torch.cat(first).bool()
    if not len(d):
        raise ConfigError("the dumped steps have no token in the loss: all groups were skipped")
    at_mu = d[f & (a == 0)]
    return {
        "tokens": len(d),
        "responses": int(sum(batch["response_mask"].any(-1).sum() for batch, _ in batches)),
        "mean": float(d.mean()),
        "quantiles": {str(at): float(np.quantile(d, at)) for at in QUANTILES},
        "largest": float(d.max()),
        "mean_by_age": {str(int(age)): float(d[a == age].mean()) for age in a.unique()},
        "floor": {"tokens": len(at_mu), "mean": float(at_mu.mean()), "largest": float(at_mu.max())}
        if len(at_mu)
        else None,
    }


def top_k(batches: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """What the K most likely tokens leave over, in float64; None where no Top-K divergence was dumped.

    ``outside``: share of sampled tokens that are not among the rollout's K. ``other_mu``, ``other_pi``: mean
    probability of the cell of all tokens but the K and the sampled one.
    """
    if not all("topk_ids" in batch for batch in batches):
        return None
    found: dict[str, list[torch.Tensor]] = {"outside": [], "other_mu": [], "other_pi": []}
    for batch in batches:
        valid = batch["response_mask"].bool()
        out = (batch["topk_ids"] != batch["responses"].unsqueeze(-1)).all(-1)[valid]
        found["outside"].append(out.double())
        for name, side in (("other_mu", "rollout_"), ("other_pi", "")):
            of_y, of_k = (batch[f"{side}{kind}"][valid].double().exp() for kind in ("log_prob", "topk_log_prob"))
            found[name].append((1 - of_k.sum(-1) - out * of_y).clamp_min(0))
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def suggest(batches: Sequence[dict[str, Any]], floor: dict[str, Any] | None, share: float, w_min: float) -> Suggestion:
    """The smallest delta_b that masks no more than ``share`` of the tokens together with a delta of ten times that.

    Never below twice the mean mismatch of the engines, which would spend it without any learning.
    """
    least = _LEAST if floor is None else max(_LEAST, 2 * floor["mean"])

    def allows(budget: float) -> bool:
        return masked(batches, RATIO * budget, budget, w_min).masked <= share

    budget = _two_digits(least)
    if allows(budget):
        if budget > _two_digits(_LEAST):
            return Suggestion(_two_digits(RATIO * budget), budget, "twice the mean mismatch of the engines")
        return Suggestion(_two_digits(RATIO * budget), budget, "hardly a token has moved: dump later or staler steps")
    # The share falls with the budget but for single tokens, so that halving an interval finds the place.
    low, high = math.log(budget), math.log(2 * budget)
    while not allows(math.exp(high)):
        low, high = high, high + math.log(2)
    while high - low > math.log(1.02):
        middle = (low + high) / 2
        low, high = (low, middle) if allows(math.exp(middle)) else (middle, high)
    budget = _two_digits(math.exp(high))
    return Suggestion(_two_digits(RATIO * budget), budget, f"masks {100 * share:g}% of these tokens (--share)")


def masked(batches: Sequence[dict[str, Any]], delta: float, delta_b: float | None, w_min: float) -> Share:
    """What CPPO's mask (linear weights, fixed budget) rejects of the dumped tokens."""
    tokens = rejected = by_prefix = 0
    for batch in batches:
        valid = batch["response_mask"]
        budget = None if delta_b is None else torch.full((len(valid),), delta_b)
        region = core.cppo_mask(
            batch["log_prob"] - batch["rollout_log_prob"],
            batch["advantages"],
            batch["divergence"],
            valid,
            delta=delta,
            weights=core.position_weights(valid, w_min),
            delta_b=budget,
        )
        dropped = valid & ~region.keep
        tokens += int(valid.sum())
        rejected += int(dropped.sum())
        by_prefix += int((dropped & ~region.token_exceeded).sum())
    return Share(rejected / tokens, by_prefix / tokens)


def _minibatch(file: Path) -> int:
    return int(file.name.removeprefix("minibatch").partition("_")[0])


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _show(record: dict[str, Any], grid: list[list[Share]]) -> None:
    floor, hint = record["floor"], record["suggestion"]
    say(f"{record['tokens']:,} tokens of {record['responses']:,} responses, {record['divergence']}")
    quantiles = ", ".join(f"P{100 * float(at):g} {value:.3g}" for at, value in record["quantiles"].items())
    say(f"D: mean {record['mean']:.3g}, {quantiles}, largest {record['largest']:.3g}")
    if len(record["mean_by_age"]) > 1:
        say("mean D by age: " + ", ".join(f"{age}: {value:.3g}" for age, value in record["mean_by_age"].items()))
    say(
        "mismatch of the engines: not in these steps (no token of age 0 before an update)"
        if floor is None
        else f"mismatch of the engines (D where pi is mu, {floor['tokens']:,} tokens): mean {floor['mean']:.3g}, "
        f"largest {floor['largest']:.3g}"
    )
    if (rest := record["top_k"]) is not None:
        say(
            f"Top-K: {rest['outside']:.3%} of the sampled tokens are outside the K; everything else has a mass of "
            f"{rest['other_mu']:.3g} under mu and {rest['other_pi']:.3g} under pi"
        )
    table = Table(title=f"tokens masked, in brackets by the prefix budget alone; w_min {record['w_min']:g}")
    table.add_column("delta")
    for budget in record["delta_b"]:
        table.add_column("no budget" if budget is None else f"delta_b {budget:.2g}", justify="right", no_wrap=True)
    for delta, row in zip(record["delta"], grid, strict=True):
        table.add_row(f"{delta:.2g}", *(f"{share.masked:.2%} ({share.by_prefix:.2%})" for share in row))
    console(width=120).print(table)
    say(f"to begin with: method.delta={hint['delta']:g} method.delta_b={hint['delta_b']:g}")
    say(f"  delta_b: {hint['reason']}; delta: ten times that, the paper's ratio. A starting point, not a tuned value")
