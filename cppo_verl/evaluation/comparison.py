"""Two evaluations on the same questions: paired differences, and in which settings they differ."""

import json
from typing import Any

import numpy as np
from rich.table import Table

from cppo_verl.evaluation import statistics
from cppo_verl.evaluation.report import averaged, rich_table
from cppo_verl.evaluation.samples import Evaluation, EvaluationError


def compare(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """Paired differences a - b, per benchmark that both have and for their mean; what differs in the settings.

    Raises:
        EvaluationError: no benchmark in common, or one with other questions or golds.
    """
    names = [name for name in a.benchmarks if name in b.benchmarks]
    if not names:
        raise EvaluationError(f"{a.folder} and {b.folder} share no benchmark ({a.benchmarks} and {b.benchmarks})")
    orders = {name: _common_order(a, b, name) for name in names}
    pairs = {name: (a.correct(name)[order[0]], b.correct(name)[order[1]]) for name, order in orders.items()}
    rows = {name: _difference([pair]) for name, pair in pairs.items()}
    label, members = averaged(names)
    if members:
        rows[label] = _difference([pairs[name] for name in members])
    return {"a": str(a.folder), "b": str(b.folder), "rows": rows, "settings": _setting_differences(a, b)}


def _common_order(a: Evaluation, b: Evaluation, name: str) -> tuple[list[int], list[int]]:
    """Positions of the same questions in both; a question is its prompt and its gold."""
    keys = []
    for evaluation in (a, b):
        questions = (question for question in evaluation.questions if question.benchmark == name)
        keys.append([json.dumps([question.prompt, question.gold]) for question in questions])
    if sorted(keys[0]) != sorted(keys[1]):
        only = len(set(keys[0]) ^ set(keys[1]))
        raise EvaluationError(
            f"{name} has other questions in {a.folder} than in {b.folder} ({only} prompts or golds are in one only): "
            "evaluate both on the same data files"
        )
    return list(range(len(keys[0]))), [keys[1].index(key) for key in keys[0]]


def _difference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if min(map(len, first)) < 2:
        raise EvaluationError("a comparison needs at least two questions of every benchmark")
    difference, low, high, p_value = statistics.mean_paired_difference(first, second)
    return {
        "a": float(np.mean([statistics.avg_at_k(correct) for correct in first])),
        "b": float(np.mean([statistics.avg_at_k(correct) for correct in second])),
        "questions": sum(map(len, first)),
        "difference": difference,
        "low": low,
        "high": high,
        "p_value": p_value,
    }


def _setting_differences(a: Evaluation, b: Evaluation) -> dict[str, list[Any]]:
    """Settings that differ other than the model itself: the difference may be theirs."""
    first, second = (dict(evaluation.manifest["settings"]) for evaluation in (a, b))
    flat = [{**s["decoding"], "chat": s["chat"], "reward": s["reward"]} for s in (first, second)]
    return {key: [flat[0].get(key), flat[1].get(key)] for key in flat[0] if flat[0].get(key) != flat[1].get(key)}


def table(comparison: dict[str, Any], width: int) -> Table:
    """The table that `cppo compare` prints; differences in percentage points."""
    headings = ("benchmark", "questions", "A", "B", "A - B", "95% over questions", "p")
    rows = (
        (
            name,
            str(row["questions"]),
            f"{row['a']:.1%}",
            f"{row['b']:.1%}",
            f"{100 * row['difference']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            f"{row['p_value']:.4f}",
        )
        for name, row in comparison["rows"].items()
    )
    return rich_table(headings, rows, width)
