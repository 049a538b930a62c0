"""Whether a step had anything to learn from, and why not."""

from collections.abc import Mapping, Sequence
from typing import Any

# Share of a step's responses from which something is named as the likely cause.
_MANY = 0.5


def without_signal(line: Mapping[str, Any]) -> bool:
    """No group of the step (a line of metrics.jsonl) has both right and wrong responses."""
    total = line.get("groups/total")
    if total:
        return bool(line["groups/zero_variance"] == total)
    # run.mask_std_0=false counts no groups.
    return line.get("critic/advantages/max") == 0 == line.get("critic/advantages/min")


def causes(line: Mapping[str, Any]) -> str:
    """The likely causes with what to change, the first to look at first."""
    right, found = line.get("grading/right"), []
    answers = sum(line.get(f"grading/{name}") or 0 for name in ("right", "wrong", "no_answer", "timeout", "error"))
    failed = (line.get("grading/timeout") or 0) + (line.get("grading/error") or 0)
    if answers and failed / answers >= _MANY:
        found.append(f"the grader failed on {failed / answers:.0%} of the responses (logs/, docs/grading.md)")
    if (cut := line.get("rollout/truncation_rate") or 0) >= _MANY:
        found.append(f"{cut:.0%} of the responses were cut off: raise data.max_response_length, or ask for less")
    if (unanswered := line.get("grading/no_answer_rate") or 0) >= _MANY:
        found.append(
            f"{unanswered:.0%} gave no answer that can be found: the prompt has to ask for \\boxed{{}}, and the model "
            "to follow it (an instruction-tuned one does)"
        )
    if not found and right == answers and answers:
        found.append("every response is right: harder problems are needed")
    if not found:
        found.append(
            "no response is right: easier problems, a larger actor_rollout_ref.rollout.n, or another reward function"
            if right == 0
            else "more responses a problem (actor_rollout_ref.rollout.n), or problems of middling difficulty"
        )
    return "; ".join(found)


def verdict(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Of a whole run, for its summary; None where at least half of its steps had a signal."""
    silent = [line for line in lines if without_signal(line)]
    if not silent or len(silent) / len(lines) < _MANY:
        return None
    return f"{len(silent)} of {len(lines)} steps had no group with right and wrong responses: {causes(silent[-1])}"
