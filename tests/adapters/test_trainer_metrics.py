"""Metrics that the trainer computes from a step's responses and from a validation."""

from types import SimpleNamespace

import pytest

from cppo_verl.adapters.driver.step_metrics import aime_mean, outcome_metrics, require_finite_gradient
from cppo_verl.adapters.driver.trajectories import ResponseKey, zero_variance_groups
from cppo_verl.grading import compute_score

RESPONSES = [r"\boxed{34}", r"\boxed{34}", r"\boxed{35}", "34", r"\boxed{9^{9^9}}"]


def test_outcomes_and_truncation_are_counted():
    fields = [
        {"reward_extra_info": compute_score("x", text, "34"), "truncated": text == "34", "turn_scores": []}
        for text in RESPONSES
    ]
    assert outcome_metrics(fields) == {
        "grading/right": 2,
        "grading/wrong": 1,
        "grading/no_answer": 1,
        "grading/timeout": 0,
        "grading/error": 1,
        "grading/no_answer_rate": 0.2,
        "rollout/truncation_rate": 0.2,
    }


def test_a_reward_without_flags_has_no_outcomes():
    fields = [{"reward_extra_info": {"acc": 1.0}, "truncated": False}, {"reward_extra_info": {"acc": 0.0}}]
    assert outcome_metrics(fields) == {"rollout/truncation_rate": 0.0}


def test_calls_of_tools_a_response_and_all_that_failed():
    fields = [
        {"tool_calls": 2, "tool_errors": 1},
        {"tool_calls": 0, "tool_errors": 0},
        {"tool_calls": 3, "tool_errors": 2},
    ]
    metrics = outcome_metrics(fields)
    assert metrics == {"rollout/tool_calls": 5 / 3, "rollout/tool_errors": 3}
    assert outcome_metrics([]) == {}


def test_aime_mean_needs_all_three():
    metrics = {f"val-core/aime{year}/acc/mean@16": score for year, score in ((24, 0.3), (25, 0.2), (26, 0.1))}
    metrics |= {"val-core/aime24/acc/best@16/mean": 0.9, "val-core/math500/acc/mean@16": 0.8}
    assert aime_mean(metrics) == {"val-core/aime_mean/acc/mean@16": pytest.approx(0.2)}
    del metrics["val-core/aime25/acc/mean@16"]
    assert aime_mean(metrics) == {}


def test_groups_are_skipped_by_acc_whatever_shaping_does_to_the_score():
    """Three groups of two: all right with different scores, mixed, all wrong; and a padding row."""
    rows = [("a", 1, 0.5), ("b", 1, 1.0), ("a", 1, 0.9), ("c", 0, 0.0), ("b", 0, -0.2), ("c", 0, -1.0), ("a", 0, 0.0)]
    batch = SimpleNamespace(
        keys=[f"{group}_{row}_0" for row, (group, _, _) in enumerate(rows)],
        tags=[{"is_padding": row == 6} for row in range(len(rows))],
    )
    verdicts = [{"reward_extra_info": {"acc": acc, "score": score}} for _, acc, score in rows]
    skipped, groups = zero_variance_groups(batch, verdicts)
    assert skipped == [[0, 2], [3, 5]]
    assert groups == 3
    with pytest.raises(ValueError, match="must return a dict with score and acc"):
        zero_variance_groups(batch, [{"reward_extra_info": {"score": 1.0}}] * 7)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_norm_that_is_not_finite_stops_the_run(norm):
    require_finite_gradient({"actor/grad_norm": 1.0}, 7)
    require_finite_gradient({}, 7)
    with pytest.raises(FloatingPointError, match=f"the gradient norm of step 7 is {norm}: training stopped"):
        require_finite_gradient({"actor/grad_norm": norm}, 7)


def test_a_response_key_is_read_from_its_end():
    """verl's uid is a UUID today; whatever it holds, sample and output are the last two parts."""
    assert ResponseKey.parse("3f-a_b_12_0") == ("3f-a_b", 12, 0)
