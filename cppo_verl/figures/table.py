"""Tables 1 and 4 from run folders: Avg@k per method and benchmark with both errors, the published numbers beside."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cppo_verl.data.sources import AIME
from cppo_verl.evaluation import statistics
from cppo_verl.evaluation.report import averaged
from cppo_verl.evaluation.samples import Evaluation
from cppo_verl.evaluation.validation import Problem, validations, verdicts
from cppo_verl.figures.runs import Group, Run, grouped
from cppo_verl.problems import ConfigError
from cppo_verl.run.files import read_json
from cppo_verl.run.terminal import plain

BEST, LAST = "best", "last"
_AIME_MEAN = averaged(list(AIME))[0]
# Benchmark -> problem -> one verdict a sample.
Verdicts = dict[str, dict[Problem, list[bool]]]


@dataclass(frozen=True)
class Checkpoint:
    """The samples by which one run is judged."""

    step: int
    source: str
    """Where they come from, in words."""
    biased: bool
    """Whether the step was chosen by these very samples: the best of several noisy scores is too high."""
    verdicts: Verdicts

    @cached_property
    def correct(self) -> dict[str, NDArray[np.bool_]]:
        """Benchmark -> ``[questions, samples]`` of the questions (sorted) with all samples."""
        arrays = {}
        for name, rows in self.verdicts.items():
            samples = max(map(len, rows.values()))
            arrays[name] = np.array([row for _, row in sorted(rows.items()) if len(row) == samples], dtype=bool)
        return arrays

    @property
    def incomplete(self) -> int:
        """Questions that lack samples and are left out."""
        return sum(len(rows) - len(self.correct[name]) for name, rows in self.verdicts.items())


class Score(NamedTuple):
    """Of one benchmark, or of the unweighted mean of several; fractions."""

    avg: float
    decoding_error: float | None
    """One standard error with the questions fixed; None with one sample a question."""
    interval: tuple[float, float] | None
    """95% with the questions as the sampling unit; None with one question, or where seeds have other questions."""
    spread: float | None
    """Standard deviation over seeds; None of one run."""
    k: int


class Row(NamedTuple):
    """One line of a table."""

    group: Group
    checkpoints: tuple[Checkpoint, ...]
    scores: dict[str, Score]
    published: dict[str, float | None]
    """Of the benchmarks that the paper reports for this model and method, in percent; None where it diverged."""


def read_rows(folders: Sequence[Path], at: str, until: int | None) -> list[Row]:
    """
    Args:
        at: BEST or LAST checkpoint of each run.
        until: the last step that counts (the paper's T_stop).

    Raises:
        ConfigError: a run has no validation (within ``until``), or a file is damaged.
    """
    return [_row(group, at, until) for group in grouped([Run.read(folder) for folder in folders])]


def judged(run: Run, at: str, until: int | None) -> Checkpoint:
    """By ``cppo eval RUN --all`` where that was done (its best is sampled afresh), else by the run's validations."""
    windows = run.folder / "eval" / "all.json"
    if until is None and windows.exists():
        remedy = "cppo eval RUN --all writes it again"
        window = read_json(windows, remedy, "best_resampled", "last")["best_resampled" if at == BEST else "last"]
        evaluation = Evaluation.read(run.folder / "eval" / Path(window["folder"]).name)
        words = "best, fresh seeds" if at == BEST else "last"
        return Checkpoint(window["step"], f"cppo eval, {words}", False, _of_evaluation(evaluation))
    files = {step: path for step, path in validations(run.folder / "validation").items() if step <= (until or math.inf)}
    if not files:
        within = "" if until is None else f" up to step {until}"
        raise ConfigError(
            f"{run.folder} has no validation{within}: cppo eval {run.folder} --all samples its checkpoints"
        )
    if at == LAST:
        step = max(files)
        return Checkpoint(step, "validation, last", False, verdicts(files[step]))
    found = [
        Checkpoint(step, f"validation, best of {len(files)}", True, verdicts(path)) for step, path in files.items()
    ]
    return max(found, key=lambda checkpoint: _mean(checkpoint))


def _mean(checkpoint: Checkpoint) -> float:
    names = averaged(list(checkpoint.correct))[1] or list(checkpoint.correct)
    return float(np.mean([statistics.avg_at_k(checkpoint.correct[name]) for name in names]))


def _of_evaluation(evaluation: Evaluation) -> Verdicts:
    found: Verdicts = {}
    for name in evaluation.benchmarks:
        questions = [question for question in evaluation.questions if question.benchmark == name]
        keys = [(json.dumps(question.prompt), question.gold) for question in questions]
        found[name] = dict(zip(keys, evaluation.correct(name).tolist(), strict=True))
    return found


def _row(group: Group, at: str, until: int | None) -> Row:
    checkpoints = tuple(judged(run, at, until) for run in group.runs)
    names = [name for name in checkpoints[0].correct if all(name in other.correct for other in checkpoints)]
    if not names:
        raise ConfigError(f"{group.runs[0].folder}: its runs share no benchmark")
    names = sorted(names, key=lambda name: (name not in AIME, name))
    scores = {name: _score([[checkpoint.correct[name]] for checkpoint in checkpoints], _same(checkpoints, [name]))
              for name in names}  # fmt: skip
    label, members = averaged(names)
    if members:
        arrays = [[checkpoint.correct[name] for name in members] for checkpoint in checkpoints]
        scores[label] = _score(arrays, _same(checkpoints, members))
    return Row(group, checkpoints, scores, published(group.runs[0]))


def _same(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> bool:
    """Whether all were asked the same questions, each with all samples."""
    first = checkpoints[0]
    return all(
        other.verdicts[name].keys() == first.verdicts[name].keys()
        and other.correct[name].shape == first.correct[name].shape
        for other in checkpoints
        for name in names
    )


def _score(seeds: list[list[NDArray[np.bool_]]], same: bool) -> Score:
    """Of runs x benchmarks of ``[questions, samples]``: the mean over benchmarks, then over runs."""
    averages = [float(np.mean([statistics.avg_at_k(correct) for correct in arrays])) for arrays in seeds]
    k = min(correct.shape[1] for arrays in seeds for correct in arrays)
    errors = [statistics.mean_decoding_error(arrays) for arrays in seeds] if k > 1 else []
    # A question's mean over all runs' samples is one draw of a question.
    pooled = [np.concatenate(arrays, axis=1) for arrays in zip(*seeds, strict=True)] if same else []
    several = bool(pooled) and min(map(len, pooled)) > 1
    return Score(
        float(np.mean(averages)),
        math.hypot(*errors) / len(errors) if errors else None,
        statistics.mean_question_interval(pooled) if several else None,
        float(np.std(averages, ddof=1)) if len(averages) > 1 else None,
        k,
    )


def published(run: Run) -> dict[str, float | None]:
    """What the paper reports for the run's model and method; empty for others."""
    models = json.loads(resources.files("cppo_verl.figures").joinpath("paper.json").read_text())["models"].values()
    for entry in models:
        if entry["model"].rpartition("/")[2] == run.model and run.method in entry["avg16"]:
            return dict(zip((*AIME, _AIME_MEAN), entry["avg16"][run.method], strict=True))
    return {}


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table has to know."""
    found = [
        "± one standard error of decoding (questions fixed); in brackets 95% over questions. Avg@k in percent.",
    ]
    if any(len(row.checkpoints) > 1 for row in rows):
        found.append("s: standard deviation over seeds.")
    if any(checkpoint.biased for row in rows for checkpoint in row.checkpoints):
        found.append(
            "The best of several validations is biased upward; cppo eval RUN --all samples the best checkpoint afresh."
        )
    if missing := sum(checkpoint.incomplete for row in rows for checkpoint in row.checkpoints):
        found.append(f"{missing} questions lack samples and are left out.")
    return found


def as_json(rows: Sequence[Row]) -> str:
    """Everything, as fractions; ``published`` in percent as printed in the paper."""
    records = [
        {
            "label": row.group.label,
            "method": row.group.runs[0].method,
            "model": row.group.runs[0].model,
            "runs": [
                {"folder": str(run.folder), "step": checkpoint.step, "source": checkpoint.source,
                 "biased_upward": checkpoint.biased, "questions_left_out": checkpoint.incomplete}
                for run, checkpoint in zip(row.group.runs, row.checkpoints, strict=True)
            ],
            "scores": {name: score._asdict() for name, score in row.scores.items()},
            "published": row.published,
        }
        for row in rows
    ]  # fmt: skip
    return json.dumps({"rows": records, "notes": notes(rows)}, indent=2)


class Sheet(NamedTuple):
    """A table before it is Markdown or LaTeX."""

    title: str
    headings: list[str]
    lines: list[list[str]]


def sheets(rows: Sequence[Row]) -> Iterator[Sheet]:
    """Table 1 (means) where there are several models, then for each model its Table 4."""
    models = list(dict.fromkeys(row.group.runs[0].model for row in rows))
    if len(models) > 1:
        yield _means(rows, models)
    for model in models:
        yield _benchmarks(model, [row for row in rows if row.group.runs[0].model == model])


def _benchmarks(model: str, rows: Sequence[Row]) -> Sheet:
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    printed = [name for name in names if any(name in row.published for row in rows)]
    headings = ["method", *(_heading(name, rows) for name in names), *(f"{name} (paper)" for name in printed),
                "checkpoint"]  # fmt: skip
    lines = [
        [
            row.group.name,
            *(_cell(row.scores.get(name)) for name in names),
            *(_printed(row, name) for name in printed),
            _steps(row),
        ]
        for row in rows
    ]
    return Sheet(model, headings, lines)


def _means(rows: Sequence[Row], models: Sequence[str]) -> Sheet:
    """Methods down, models across; the label of a group without its model's name."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        model, name = row.group.runs[0].model, list(row.scores)[-1]
        paper = f"; paper {_printed(row, name)}" if name in row.published else ""
        label = row.group.label.removesuffix(f" {model}")
        table.setdefault(label, {})[model] = f"{_cell(row.scores[name])}{paper}"
    lines = [[label, *(cells.get(model, "-") for model in models)] for label, cells in table.items()]
    return Sheet("Mean over benchmarks", ["method", *models], lines)


def _heading(name: str, rows: Sequence[Row]) -> str:
    ks = sorted({row.scores[name].k for row in rows if name in row.scores})
    return f"{plain(name)} Avg@{'/'.join(map(str, ks))}"


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    parts = [f"{100 * score.avg:.2f}"]
    if score.decoding_error is not None:
        parts.append(f"± {100 * score.decoding_error:.2f}")
    if score.interval is not None:
        parts.append(f"[{100 * score.interval[0]:.1f}, {100 * score.interval[1]:.1f}]")
    if score.spread is not None:
        parts.append(f"s {100 * score.spread:.2f}")
    return " ".join(parts)


def _printed(row: Row, name: str) -> str:
    if name not in row.published:
        return "-"
    value = row.published[name]
    return "diverged" if value is None else f"{value:.2f}"


def _steps(row: Row) -> str:
    steps = ", ".join(str(checkpoint.step) for checkpoint in row.checkpoints)
    return f"step {steps} ({', '.join(dict.fromkeys(checkpoint.source for checkpoint in row.checkpoints))})"


def markdown(rows: Sequence[Row]) -> str:
    parts = []
    for sheet in sheets(rows):
        body = [sheet.headings, ["---", *("---:" for _ in sheet.headings[1:])], *sheet.lines]
        lines = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in body)
        parts += [f"### {sheet.title}", lines]
    return "\n\n".join([*parts, *notes(rows)]) + "\n"


_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$"}  # fmt: skip


def latex(rows: Sequence[Row]) -> str:
    """One ``table`` environment a sheet, with booktabs' rules."""
    parts = []
    for sheet in sheets(rows):
        body = [" & ".join(map(_escaped, line)) + r" \\" for line in sheet.lines]
        parts += [
            r"\begin{table}",
            rf"\caption{{{_escaped(sheet.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(sheet.headings) - 1)}}}",
            r"\toprule",
            " & ".join(map(_escaped, sheet.headings)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join([*parts, *(f"% {note}" for note in notes(rows))]) + "\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
