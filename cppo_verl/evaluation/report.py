"""The numbers of an evaluation, computed from its kept samples alone, and their Markdown and terminal tables."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from rich.table import Table

from cppo_verl.data.sources import AIME
from cppo_verl.evaluation import statistics
from cppo_verl.evaluation.samples import Evaluation, Sample
from cppo_verl.grading import OUTCOMES
from cppo_verl.grading.exact import number
from cppo_verl.grading.normalize import clean
from cppo_verl.run.files import write_atomically


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers of a complete evaluation as plain JSON data; shares are fractions, lengths are tokens.

    Raises:
        EvaluationError: samples are missing.
    """
    benchmarks = {name: _benchmark(evaluation, name) for name in evaluation.benchmarks}
    label, members = averaged(evaluation.benchmarks)
    return {
        "folder": str(evaluation.folder),
        "n": evaluation.n,
        "benchmarks": benchmarks,
        "mean": {"label": label, "benchmarks": members, **_mean(evaluation, benchmarks, members)} if members else None,
        "settings": evaluation.manifest["settings"],
        "attempts": evaluation.manifest["attempts"],
    }


def averaged(benchmarks: list[str]) -> tuple[str, list[str]]:
    """(label, benchmarks) of the unweighted mean: AIME24/25/26 where all three are there, else all; none of one."""
    if set(AIME) <= set(benchmarks):
        return "AIME24/25/26", list(AIME)
    return ("mean", benchmarks) if len(benchmarks) > 1 else ("", [])


def spelling(answer: str | None) -> str | None:
    """One spelling for equal answers, for a majority vote: plain numbers by value, the rest by cleaned text."""
    if answer is None or not (text := clean(answer)):
        return None
    value = number(text)
    return text if value is None else str(value)


def _benchmark(evaluation: Evaluation, name: str) -> dict[str, Any]:
    rows = evaluation.rows(name)
    correct = evaluation.correct(name)
    samples = [sample for row in rows for sample in row]
    tokens = np.array([sample.tokens for sample in samples])
    return {
        "questions": len(rows),
        "avg": statistics.avg_at_k(correct),
        "decoding_error": statistics.decoding_error(correct) if evaluation.n > 1 else None,
        "interval": list(statistics.question_interval(correct)) if len(rows) > 1 else None,
        "pass_at_k": {str(k): statistics.pass_at_k(correct, k) for k in range(1, evaluation.n + 1)},
        "maj_at_k": statistics.maj_at_k([[spelling(s.answer) for s in row] for row in rows], correct)
        if evaluation.extracts_answers
        else None,
        "outcomes": {name: sum(sample.outcome == name for sample in samples) for name in OUTCOMES},
        "truncated": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "tokens": {
            "mean": float(tokens.mean()),
            "median": float(np.median(tokens)),
            "max": int(tokens.max()),
            "mean_right": _mean_tokens(samples, True),
            "mean_not_right": _mean_tokens(samples, False),
        },
    }


def _mean_tokens(samples: list[Sample], right: bool) -> float | None:
    chosen = [sample.tokens for sample in samples if (sample.outcome == "right") == right]
    return float(np.mean(chosen)) if chosen else None


def _mean(evaluation: Evaluation, benchmarks: dict[str, Any], members: list[str]) -> dict[str, Any]:
    correct = [evaluation.correct(name) for name in members]
    entries = [benchmarks[name] for name in members]
    votes = [entry["maj_at_k"] for entry in entries]
    several_questions = min(len(rows) for rows in correct) > 1
    return {
        "questions": sum(entry["questions"] for entry in entries),
        "avg": float(np.mean([entry["avg"] for entry in entries])),
        "decoding_error": statistics.mean_decoding_error(correct) if evaluation.n > 1 else None,
        "interval": list(statistics.mean_question_interval(correct)) if several_questions else None,
        "pass_at_k": {
            str(k): float(np.mean([entry["pass_at_k"][str(k)] for entry in entries]))
            for k in range(1, evaluation.n + 1)
        },
        "maj_at_k": None if None in votes else float(np.mean(votes)),
    }


def _scores(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the first table: what the model scored."""
    entries = dict(report["benchmarks"])
    if report["mean"]:
        entries[report["mean"]["label"]] = report["mean"]
    for name, entry in entries.items():
        error, interval, vote = entry["decoding_error"], entry["interval"], entry["maj_at_k"]
        yield (
            name,
            str(entry["questions"]),
            f"{entry['avg']:.1%}",
            "-" if error is None else f"± {100 * error:.1f}",
            "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}",
            f"{entry['pass_at_k'][str(report['n'])]:.1%}",
            "-" if vote is None else f"{vote:.1%}",
        )


def _behaviour(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the second table: what went on in the samples."""
    for name, entry in report["benchmarks"].items():
        total = entry["questions"] * report["n"]
        rates = (f"{entry['outcomes'][outcome] / total:.2%}" for outcome in OUTCOMES if outcome != "right")
        tokens = entry["tokens"]
        lengths = (f"{tokens['mean']:.0f}", f"{tokens['median']:.0f}", f"{tokens['max']}")
        yield (name, *rates, f"{entry['truncated']:.2%}", *lengths)


def _score_headings(n: int) -> tuple[str, ...]:
    return ("benchmark", "questions", f"Avg@{n}", "decoding error", "95% over questions", f"pass@{n}", f"maj@{n}")


_BEHAVIOUR_HEADINGS = (
    "benchmark", "wrong", "no answer", "timeout", "grader error", "truncated", "mean tokens", "median", "longest",
)  # fmt: skip


def terminal_tables(report: dict[str, Any], width: int) -> list[Table]:
    """The two tables that `cppo eval` and `cppo report` print, for a terminal of so many characters."""
    return [
        rich_table(_score_headings(report["n"]), _scores(report), width),
        rich_table(_BEHAVIOUR_HEADINGS, _behaviour(report), width),
    ]


def rich_table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]], width: int) -> Table:
    """No word is cut in 80 characters: where ``width`` is too small, each word of a heading has a line."""
    rows = list(rows)
    widths = (max(map(len, column)) for column in zip(headings, *rows, strict=True))
    if sum(widths) + 2 * (len(headings) - 1) > width:
        headings = tuple(heading.replace(" ", "\n") for heading in headings)
    table = Table(box=None, pad_edge=False)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    return table


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader of the numbers has to know."""
    found = [
        "decoding error: one standard error with the questions fixed (the same model sampled again); "
        "95% over questions: other questions of the same kind."
    ]
    failed = sum(entry["outcomes"][name] for entry in report["benchmarks"].values() for name in ("timeout", "error"))
    if failed:
        found.append(f"{failed} samples could not be graded and count as not right: the scores are lower bounds.")
    return found


def markdown(report: dict[str, Any]) -> str:
    """The whole report: scores, pass@k for every k, rates and lengths, and what it was made with."""
    settings, attempts = report["settings"], report["attempts"]
    chat, reward = settings["chat"], settings["reward"]
    columns = {**report["benchmarks"], **({report["mean"]["label"]: report["mean"]} if report["mean"] else {})}
    passes = (
        (f"pass@{k}", *(f"{entry['pass_at_k'][str(k)]:.1%}" for entry in columns.values()))
        for k in range(1, report["n"] + 1)
    )
    facts = {
        "model": f"{settings['model']['source']} (sha256 {settings['model']['sha256'][:16]})",
        "decoding": ", ".join(f"{key} {value}" for key, value in settings["decoding"].items()),
        "chat template": f"sha256 {chat['template_sha256'][:16]}, arguments {chat['arguments']}",
        "reward": f"{reward['path']} {reward['name']} {reward['kwargs'] or ''}".strip(),
        "data": ", ".join(f"{name} (sha256 {sha[:16]})" for name, sha in settings["questions"].items()),
    }
    for attempt, made_with in enumerate(attempts, 1):
        packages = ", ".join(f"{name} {version}" for name, version in made_with["packages"].items() if version)
        hardware = ", ".join(
            [f"{made_with['hardware']['cores']} cores {made_with['hardware']['cpu']}", *made_with["hardware"]["gpus"]]
        )
        facts[f"sampled by (attempt {attempt} of {len(attempts)})"] = (
            f"`{made_with['command']}`, {made_with['started']}, commit {made_with['commit']}, {hardware}; {packages}"
        )
    parts = [
        f"# Avg@{report['n']} of {settings['model']['name']}",
        _markdown_table(_score_headings(report["n"]), _scores(report)),
        *notes(report),
        _markdown_table(_BEHAVIOUR_HEADINGS, _behaviour(report)),
        _markdown_table(("unbiased", *columns), passes),
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [headings, ("---", *("---:" for _ in headings[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(evaluation: Evaluation) -> dict[str, Any]:
    """``report.json`` and ``report.md`` in the evaluation's folder; returns the numbers."""
    report = summarize(evaluation)
    write_atomically(evaluation.folder / "report.json", json.dumps(report, indent=2) + "\n")
    page = markdown(report).encode(errors="backslashreplace").decode()
    write_atomically(evaluation.folder / "report.md", page)
    return report
