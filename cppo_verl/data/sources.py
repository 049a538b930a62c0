"""Data sets by name: on the Hugging Face hub, or the same columns in a local file."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from numbers import Number
from pathlib import Path
from typing import Any

from cppo_verl.grading.extract import final_answer
from cppo_verl.grading.normalize import MAX_LENGTH
from cppo_verl.problems import ConfigError


class DataError(ConfigError):
    """A data set that cannot be had or read; the message says what to do."""


@dataclass(frozen=True)
class HubSource:
    """One split of a data set on the hub and the columns that hold problem and answer."""

    repository: str
    split: str
    problem: str
    answer: str
    config: str | None = None


# Where each name is fetched from; NAME=REPOSITORY or NAME=FILE on the command line uses another one.
HUB = {
    "dapo": HubSource("BytedTsinghua-SIA/DAPO-Math-17k", "train", "prompt", "reward_model.ground_truth"),
    "aime24": HubSource("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": HubSource("math-ai/aime25", "test", "problem", "answer"),
    "aime26": HubSource("math-ai/aime26", "test", "problem", "answer"),
    "math500": HubSource("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
}

# The benchmarks whose unweighted mean Avg@16 is the paper's score.
AIME = ("aime24", "aime25", "aime26")

# Names under which files on disk may call the two columns, in order of preference.
_PROBLEM_COLUMNS = ("problem", "question", "prompt")
_ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "ground_truth", "solution")


@dataclass(frozen=True)
class MathProblem:
    """One problem as its source has it."""

    id: str
    problem: str
    answer: str


@dataclass(frozen=True)
class Loaded:
    """The rows of one data set, to be iterated once, and where they came from (for the manifest)."""

    rows: Iterator[MathProblem]
    origin: dict[str, str]


def load(name: str, source: str | None = None, revision: str | None = None) -> Loaded:
    """All rows of a data set.

    Args:
        name: a key of ``HUB``, or any name where ``source`` is a file.
        source: a local .jsonl, .json or .parquet file, or a hub repository to use instead of the known one.
        revision: commit, tag or branch of the hub repository; default: its newest.

    Raises:
        DataError: the file or repository cannot be read, or has no columns for problem and answer.
    """
    if source is not None and (Path(source).suffix in (".jsonl", ".json", ".parquet") or Path(source).exists()):
        return _load_file(name, Path(source))
    if source is None and name not in HUB:
        raise DataError(f"{name}: not a known data set ({', '.join(HUB)}); give its file as {name}=FILE")
    return _load_hub(name, source, revision)


def _load_file(name: str, path: Path) -> Loaded:
    if not path.is_file():
        raise DataError(f"{name}: {path} {'is a folder; give a file' if path.is_dir() else 'does not exist'}")
    records = _readable(name, path, _parquet(path) if path.suffix == ".parquet" else _json_lines(path))
    return Loaded(_problems(name, path, records, _PROBLEM_COLUMNS, _ANSWER_COLUMNS), {"file": path.name})


def _readable(name: str, path: Path, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from records
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: {path} cannot be read: {error}") from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number}: {error}") from None
                if not isinstance(record, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                yield record


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _load_hub(name: str, repository: str | None, revision: str | None) -> Loaded:
    import datasets
    from huggingface_hub import HfApi

    known = HUB.get(name)
    repository = repository or HUB[name].repository
    split = known.split if known else "train"
    try:
        resolved = HfApi().dataset_info(repository, revision=revision).sha
        table = datasets.load_dataset(repository, known.config if known else None, split=split, revision=resolved)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{name}: {repository} cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            f"on a machine without network give a file: {name}=FILE.jsonl"
        ) from None
    problems: tuple[str, ...] = _PROBLEM_COLUMNS
    answers: tuple[str, ...] = _ANSWER_COLUMNS
    if known and repository == known.repository:
        problems, answers = (known.problem,), (known.answer,)
    origin = {"repository": repository, "revision": str(resolved), "split": split}
    return Loaded(_problems(name, repository, table_rows(table), problems, answers), origin)


def table_rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a ``datasets.Dataset``, a few thousand in memory at a time."""
    for batch in table.with_format("arrow").iter(batch_size=4096):
        yield from batch.to_pylist()


def _column(name: str, origin: object, record: dict[str, Any], candidates: tuple[str, ...]) -> str:
    for candidate in candidates:
        if _value(record, candidate) is not None:
            return candidate
    raise DataError(f"{name}: {origin} has none of the columns {', '.join(candidates)} (it has {_listed(record)})")


def _listed(record: dict[str, Any], most: int = 10) -> str:
    names = [name[:40] for name in record]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _value(record: dict[str, Any], column: str) -> Any:
    value: Any = record
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _problems(
    name: str, origin: object, records: Iterator[dict[str, Any]], problems: tuple[str, ...], answers: tuple[str, ...]
) -> Iterator[MathProblem]:
    first = next(records, None)
    if first is None:
        raise DataError(f"{name}: {origin} is empty")
    problem, answer = (_column(name, origin, first, names) for names in (problems, answers))
    for number, record in enumerate(chain([first], records)):
        row = f"{name}: {origin}: row {number + 1}"
        text, gold = _value(record, problem), _value(record, answer)
        if isinstance(text, list):  # chat messages, as verl's own files have them
            if not all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in text):
                raise DataError(f"{row} has a {problem} that is no list of chat messages with role and content")
            text = "\n".join(message["content"] for message in text if message.get("role") == "user")
        if not str(text or "").strip() or not str("" if gold is None else gold).strip():
            column = answer if str(text or "").strip() else problem
            lacks = "an empty" if _value(record, column) is not None else "no"
            raise DataError(
                f"{row} has {lacks} {column} (it has {_listed(record)}); "
                f"all rows are read by the first one's columns, {problem} and {answer}"
            )
        own = record.get("id")
        found = MathProblem(f"{name}-{number}" if own is None else str(own), str(text), str(gold))
        if wrong := _unusable(found, text, gold):
            raise DataError(f"{row} has {wrong[0].format(problem=problem, answer=answer)}; {wrong[1]}")
        yield found


def _unusable(row: MathProblem, text: Any, gold: Any) -> tuple[str, str] | None:
    """(what is wrong, what to do) of a row that no response could be right on, or that cannot be written."""
    if not isinstance(text, str):
        return "a {problem} that is not text", "give the problem as text"
    if not isinstance(gold, str | Number) or isinstance(gold, bool) or gold != gold:
        return "an {answer} that is neither text nor a number", "give one answer as text"
    if len(final_answer(row.answer) or row.answer) > MAX_LENGTH:
        return f"an {{answer}} of over {MAX_LENGTH} characters", "the grader takes none; give the final answer alone"
    try:
        "".join(asdict(row).values()).encode()
    except UnicodeEncodeError:
        return "a lone surrogate (\\ud800 to \\udfff) in it", "write its text as UTF-8"
    return None
