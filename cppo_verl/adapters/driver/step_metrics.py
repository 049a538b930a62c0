"""What the driver computes from a step's verdicts and from a validation's metrics; pure functions."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cppo_verl.adapters.columns import TOOL_CALLS, TOOL_ERRORS, TRUNCATED
from cppo_verl.data.sources import AIME
from cppo_verl.grading import OUTCOMES


def outcome_metrics(extra_fields: list[dict[str, Any]]) -> dict[str, float]:
    """How many responses of a step had each outcome, the shares that were cut off or gave no answer, calls of tools.

    Outcomes are the ``grade_*`` flags of :func:`cppo_verl.grading.compute_score`; other reward functions may lack them.
    """
    metrics: dict[str, float] = {}
    verdicts = [fields.get("reward_extra_info", {}) for fields in extra_fields]
    flags = [name for name in OUTCOMES if name != "right"]
    if verdicts and all(f"grade_{name}" in verdict for verdict in verdicts for name in flags):
        counts = {name: sum(verdict[f"grade_{name}"] > 0 for verdict in verdicts) for name in flags}
        metrics = {f"grading/{name}": counts[name] for name in flags}
        metrics["grading/right"] = len(verdicts) - sum(counts.values())
        metrics["grading/no_answer_rate"] = counts["no_answer"] / len(verdicts)
    truncated = [fields[TRUNCATED] for fields in extra_fields if TRUNCATED in fields]
    if truncated:
        metrics["rollout/truncation_rate"] = sum(truncated) / len(truncated)
    calls = [fields[TOOL_CALLS] for fields in extra_fields if TOOL_CALLS in fields]
    if calls:
        metrics["rollout/tool_calls"] = sum(calls) / len(calls)
        metrics["rollout/tool_errors"] = sum(fields.get(TOOL_ERRORS, 0) for fields in extra_fields)
    return metrics


def aime_mean(metrics: Mapping[str, float]) -> dict[str, float]:
    """The unweighted mean of AIME24, AIME25 and AIME26 where a validation has all three, named as verl names theirs."""
    scores = {}
    for name in metrics:
        if name.startswith(f"val-core/{AIME[0]}/acc/mean@"):
            names = [name.replace(AIME[0], benchmark, 1) for benchmark in AIME]
            if all(other in metrics for other in names):
                scores[name.replace(AIME[0], "aime_mean", 1)] = float(np.mean([metrics[other] for other in names]))
    return scores


def accuracy(extra_fields: dict[str, Any]) -> float:
    """The verdict of a response: shaping may change its score, not whether a group carries a signal."""
    verdict = extra_fields.get("reward_extra_info", {})
    if "acc" not in verdict:
        raise ValueError(f"the reward function must return a dict with score and acc (1 right, 0 wrong); got {verdict}")
    return float(verdict["acc"])


def require_finite_rewards(extra_fields: list[dict[str, Any]]) -> None:
    """A NaN in one response spreads over its group, or hides in one that mask_std_0 leaves out."""
    for fields in extra_fields:
        verdict = fields.get("reward_extra_info", {})
        wrong = [name for name in ("score", "acc") if not math.isfinite(verdict.get(name, 0.0))]
        if wrong:
            raise ValueError(
                f"the reward function returned {wrong[0]} = {verdict[wrong[0]]} for a response: training stopped. The "
                "last checkpoint is intact; mend the reward, then continue with run.resume=true"
            )


def require_finite_gradient(metrics: Mapping[str, Any], step: int) -> None:
    """On FSDP verl prints a non-finite gradient norm, skips the update and goes on; a run must not, unnoticed."""
    norm = metrics.get("actor/grad_norm")
    if norm is not None and not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm of step {step} is {norm}: training stopped. "
            "The last checkpoint is intact; a lower learning rate or run.dump_steps may show why."
        )
