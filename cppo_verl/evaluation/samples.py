"""The folder of one evaluation: what was asked (questions.jsonl, manifest.json) and every sample (samples.jsonl).

Everything a report says is computed from these three files.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cppo_verl.checkpoint.trust import OWN_REWARD
from cppo_verl.evaluation.records import read_manifest, read_records
from cppo_verl.grading import OUTCOMES, compute_score
from cppo_verl.grading.reward import grade_row
from cppo_verl.problems import ConfigError
from cppo_verl.run.files import DamagedFile, write_lines
from cppo_verl.run.folder import MANIFEST

_log = logging.getLogger(__name__)

QUESTIONS, SAMPLES = "questions.jsonl", "samples.jsonl"


class EvaluationError(ConfigError):
    """An evaluation that cannot be made, read or compared; the message says what to do."""


@dataclass(frozen=True)
class Question:
    """One problem of a benchmark, as verl's data file has it."""

    benchmark: str
    """The row's ``data_source``."""
    id: str
    """``extra_info.id``, else its number within the benchmark."""
    prompt: list[dict[str, str]]
    """Chat messages, before the chat template."""
    gold: str
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One response to one question, graded."""

    benchmark: str
    question: str
    sample: int
    """0 to n - 1; with the evaluation's seed and the prompt it decides the sampling seed."""
    seed: int
    response: str
    tokens: int
    """Length of the response, its end-of-text token included."""
    finish_reason: str
    """vLLM's: "stop", or "length" for a response cut off at max_tokens."""
    outcome: str
    """One of `grading.OUTCOMES`; "right" scores 1, everything else 0."""
    answer: str | None
    """What was extracted from the response; None without one, and with a reward function of one's own."""


def read_questions(files: Sequence[Path], limit: int | None = None) -> list[Question]:
    """The problems of verl's parquet files; a problem that a benchmark repeats counts once.

    Args:
        limit: only this many first problems of each benchmark.

    Raises:
        EvaluationError: a file is missing, unreadable or has not verl's columns, or a benchmark repeats an id.
    """
    import pyarrow.parquet as parquet

    from cppo_verl.config.check_files import inspect_data_file

    questions: dict[tuple[str, str], Question] = {}
    numbers: dict[str, int] = {}
    seen = set()
    for file in files:
        if file.is_file() and file.suffix in (".json", ".jsonl"):
            problem: str | None = "is not a parquet file: make one with cppo prepare --train --eval NAME=FILE"
        else:
            problem, _ = inspect_data_file(file, "prompt")
        if problem:
            raise EvaluationError(f"{file} {problem}")
        for row in parquet.read_table(file).to_pylist():
            benchmark, gold = str(row["data_source"]), str(row["reward_model"]["ground_truth"])
            content = (benchmark, json.dumps(row["prompt"]), gold)
            if content in seen:
                continue
            seen.add(content)
            number = numbers[benchmark] = numbers.get(benchmark, -1) + 1
            extra = row.get("extra_info") or {}
            question = Question(benchmark, str(extra.get("id", number)), row["prompt"], gold, extra)
            if (benchmark, question.id) in questions:
                raise EvaluationError(f"{file}: {benchmark} has two problems with the id {question.id}")
            if limit is None or number < limit:
                questions[benchmark, question.id] = question
    return list(questions.values())


def content_hashes(questions: Sequence[Question]) -> dict[str, str]:
    """benchmark -> SHA-256 of its questions."""
    digests: dict[str, Any] = {}
    for question in questions:
        line = json.dumps(asdict(question), sort_keys=True) + "\n"
        digests.setdefault(question.benchmark, hashlib.sha256()).update(line.encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def grade_sample(sample: Sample, question: Question, reward: Callable[..., Any] = compute_score) -> Sample:
    """The sample with outcome and answer, from the project's grader or a reward function of one's own.

    Such a function may return a number or a dict with ``acc`` (else ``score``); its sample is right where that is 1,
    and ``grade_*`` flags, if it sets them as `compute_score` does, name the outcome. What it raises is the outcome
    "error", so that no sample is lost; `Evaluation.regrade` can mend it.
    """
    plain = reward.func if isinstance(reward, functools.partial) else reward
    if plain is compute_score:
        keywords = reward.keywords if isinstance(reward, functools.partial) else {}
        verdict = grade_row(sample.response, question.gold, question.extra_info, **keywords)
        return replace(sample, outcome=verdict.outcome, answer=verdict.answer)
    try:
        result = reward(
            data_source=question.benchmark,
            solution_str=sample.response,
            ground_truth=question.gold,
            extra_info=dict(question.extra_info),
        )
    except Exception as error:
        _log.error("the reward function failed on %s %s: %r", sample.benchmark, sample.question, error)
        return replace(sample, outcome="error", answer=None)
    values: dict[str, Any] = result if isinstance(result, dict) else {"acc": result}
    named = [name for name in OUTCOMES if values.get(f"grade_{name}")]
    right = float(values.get("acc", values.get("score", 0.0))) == 1.0
    return replace(sample, outcome="right" if right else named[0] if named else "wrong", answer=None)


@dataclass(frozen=True)
class Evaluation:
    """A folder that holds an evaluation, complete or not."""

    folder: Path
    manifest: dict[str, Any]
    questions: list[Question]
    samples: dict[tuple[str, str, int], Sample]

    @classmethod
    def read(cls, folder: Path) -> "Evaluation":
        """Raises EvaluationError where ``folder`` is not an evaluation, DamagedFile where a file of it is damaged."""
        if not (folder / MANIFEST).is_file() or not (folder / QUESTIONS).is_file():
            raise EvaluationError(f"{folder} is not an evaluation: it has no {MANIFEST} and {QUESTIONS} (cppo eval)")
        again = f"put a copy back, or move {folder} away and evaluate again"
        manifest = read_manifest(folder / MANIFEST, again)
        questions = read_records(folder / QUESTIONS, Question, again)
        if not questions:
            raise DamagedFile(folder / QUESTIONS, 1, "is empty", again)
        if content_hashes(questions) != manifest["settings"]["questions"]:
            raise DamagedFile(
                folder / QUESTIONS,
                len(questions),
                f"is cut off: these are not all questions that {MANIFEST} names",
                again,
            )
        path, remedy = folder / SAMPLES, "delete that line, then continue with cppo eval"  # it is made again
        samples = read_records(path, Sample, remedy) if path.exists() else []
        asked = {(question.benchmark, question.id) for question in questions}
        for number, sample in enumerate(samples, 1):
            if (sample.benchmark, sample.question) not in asked or sample.outcome not in OUTCOMES:
                raise DamagedFile(path, number, "names a question or outcome that there is not", remedy)
        by_key = {(sample.benchmark, sample.question, sample.sample): sample for sample in samples}
        return cls(folder, manifest, questions, by_key)

    @property
    def n(self) -> int:
        """Samples per question."""
        return int(self.manifest["settings"]["decoding"]["n"])

    @property
    def extracts_answers(self) -> bool:
        """Whether the project's own grader graded: another reward function tells no answers."""
        return bool(self.manifest["settings"]["reward"]["path"] == OWN_REWARD)

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(question.benchmark for question in self.questions))

    def missing(self) -> list[tuple[Question, int]]:
        """(question, sample number) of the samples that are still to be made."""
        wanted = ((question, number) for question in self.questions for number in range(self.n))
        return [(q, number) for q, number in wanted if (q.benchmark, q.id, number) not in self.samples]

    def rows(self, benchmark: str) -> list[list[Sample]]:
        """The samples of a benchmark, [questions][samples].

        Raises:
            EvaluationError: the evaluation is not complete.
        """
        missing = len(self.missing())
        if missing:
            total = self.n * len(self.questions)
            raise EvaluationError(
                f"{self.folder} is incomplete: {total - missing} of {total} samples are there; "
                "run the same cppo eval command again to go on"
            )
        questions = [question for question in self.questions if question.benchmark == benchmark]
        return [[self.samples[benchmark, question.id, number] for number in range(self.n)] for question in questions]

    def correct(self, benchmark: str) -> np.ndarray:
        """bool [questions, samples]."""
        return np.array([[sample.outcome == "right" for sample in row] for row in self.rows(benchmark)])

    def regrade(self, reward: Callable[..., Any] = compute_score) -> int:
        """Grade every kept response again; writes samples.jsonl and returns how many outcomes changed."""
        questions = {(question.benchmark, question.id): question for question in self.questions}
        samples = list(self.samples.values())
        with ThreadPoolExecutor(8) as threads:
            graded = list(
                threads.map(lambda old: grade_sample(old, questions[old.benchmark, old.question], reward), samples)
            )
        write_lines(self.folder / SAMPLES, map(asdict, graded))
        changed = sum(old.outcome != new.outcome for old, new in zip(samples, graded, strict=True))
        self.samples.update({(new.benchmark, new.question, new.sample): new for new in graded})
        return changed
