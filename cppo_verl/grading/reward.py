"""`compute_score`: the grader under verl's reward signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cppo_verl.grading.grader import OUTCOMES, Grade, grade

# Keywords of `grade` that a row or `reward_kwargs` may set.
_OPTIONS: dict[str, Any] = {"answer_line": bool, "timeout": float}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: Mapping[str, Any] | None = None,
    **kw: Any,
) -> dict[str, float]:
    """Score one response for verl: 1.0 if right, else 0.0, with a 0/1 float for every way of not being right.

    The keys and types never vary, because verl stacks them over a batch. `answer_line` and `timeout` (see `grade`) come
    from the row's `extra_info`, else from `kw` (`reward.custom_reward_function.reward_kwargs`); `data_source` and other
    keywords are not used.
    """
    outcome = grade_row(solution_str, ground_truth, extra_info, **kw).outcome
    score = float(outcome == "right")
    flags = {f"grade_{name}": float(outcome == name) for name in OUTCOMES if name != "right"}
    return {"score": score, "acc": score, **flags}


def grade_row(response: object, gold: object, extra_info: Mapping[str, Any] | None, **kw: Any) -> Grade:
    """`grade` with the options of a row of verl's data, as `compute_score` reads them."""
    given = {**kw, **(extra_info or {})}
    options = {name: kind(given[name]) for name, kind in _OPTIONS.items() if name in given}
    return grade(response, gold, **options)
