"""`cppo prepare`: problems into verl's parquet files, without duplicates, conflicts or overlaps with other sets."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cppo_verl.data.sources import DataError, MathProblem, load
from cppo_verl.grading.exact import number
from cppo_verl.grading.normalize import clean
from cppo_verl.run.files import DamagedFile, read_json, replacing, write_atomically

TEMPLATES = {
    # Qwen's own instruction; the grader reads the last box.
    "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    # DAPO's instruction; the grader then also reads the last "Answer:" line (extra_info.answer_line).
    "answer": (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
}
_DAPO_WRAPPER = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form Answer: "
    r"\$?Answer[^\n]*\n(?P<problem>.*)\nRemember to put your answer on its own line after \"Answer:\"\.\Z",
    re.DOTALL,
)


@dataclass
class Counts:
    """What happened to the rows of one data set."""

    rows: int = 0
    duplicates: int = 0
    conflicting: int = 0
    overlapping: int = 0
    kept: int = 0
    removed: list[dict[str, str]] = field(default_factory=list)


def unwrap(text: str) -> str:
    """The bare problem of a prompt that carries DAPO's instruction; any other text unchanged."""
    found = _DAPO_WRAPPER.match(text.strip())
    return (found["problem"] if found else text).strip()


def fingerprint(text: str) -> str:
    """What is left of a problem when spelling, spacing, markup and case are ignored: lower-cased a-z and 0-9."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def comparison_key(text: str) -> str:
    """The :func:`fingerprint`; for a text in another script, of which it would leave little, the :func:`identity`."""
    latin = fingerprint(text)
    return latin if 2 * len(latin) >= sum(map(str.isalnum, text)) else identity(text)


def identity(text: str) -> str:
    """A problem's text without differences in Unicode form and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def normal_gold(answer: str) -> str:
    """A gold as the grader reads it: integers without zero-padding, degree signs, dollars, thousands separators.

    Words keep their markup, which tells the grader that they are words: `east` could be a product.
    """
    text = clean(answer)
    value = None if "%" in text else number(text)
    if value is not None and value.denominator == 1:
        return str(value)
    return answer.strip() if not text or re.fullmatch(r"[A-Za-z ()-]+", text) else text


def distinct(name: str, rows: Iterable[MathProblem], say: Callable[[str], None]) -> list[tuple[MathProblem, int]]:
    """The different (problem, answer) pairs in order, each with its number of rows; tells how many rows were read.

    The hub's DAPO has every problem about a hundred times: nothing else should be done a hundred times.
    """
    first: dict[tuple[str, str], list[Any]] = {}
    for position, row in enumerate(rows, 1):
        entry = first.setdefault((row.problem, row.answer), [row, 0])
        entry[1] += 1
        if position % 200_000 == 0:
            say(f"{name}: {position:,} rows read")
    return [(row, count) for row, count in first.values()]


def deduplicate(rows: Iterable[tuple[MathProblem, int]], counts: Counts) -> list[MathProblem]:
    """The first of every group of equal texts; none of a group whose answers differ.

    Problems that differ in signs or markup only share a :func:`comparison_key`; they are duplicates if their answers
    agree too, and different problems otherwise.

    Args:
        rows: problems, each with the number of rows it stands for.
    """
    groups: dict[str, list[tuple[MathProblem, int]]] = {}
    for row, count in rows:
        counts.rows += count
        groups.setdefault(identity(row.problem), []).append((row, count))
    kept, seen = [], set()
    for group in groups.values():
        first, total = group[0][0], sum(count for _, count in group)
        if len({row.answer for row, _ in group}) > 1:
            counts.conflicting += total
            counts.removed += [{"id": r.id, "reason": "conflicting answers", "answer": r.answer} for r, _ in group]
            continue
        key = (comparison_key(first.problem), first.answer)
        if key in seen:
            counts.duplicates += total
            continue
        seen.add(key)
        counts.duplicates += total - 1
        kept.append(first)
    return kept


def remove_overlaps(
    rows: list[MathProblem], held_out: dict[str, list[MathProblem]], counts: Counts
) -> list[MathProblem]:
    """``rows`` without the problems of the evaluation sets, compared by :func:`comparison_key`."""
    known = {comparison_key(row.problem): f"{name} {row.id}" for name, problems in held_out.items() for row in problems}
    kept = []
    for row in rows:
        match = known.get(comparison_key(row.problem))
        if match is None:
            kept.append(row)
        else:
            counts.overlapping += 1
            counts.removed.append({"id": row.id, "reason": f"is in {match}"})
    return kept


def cleaned(row: MathProblem) -> MathProblem:
    """Without DAPO's instruction, and with the gold as the grader reads it."""
    return MathProblem(row.id, unwrap(row.problem), normal_gold(row.answer))


def write(path: Path, name: str, rows: Sequence[MathProblem], template: str) -> str:
    """verl's parquet file; returns its SHA-256. The same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    text = TEMPLATES[template]
    records = [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": text.format(problem=row.problem)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row.answer},
            "extra_info": {"index": index, "id": row.id, "answer_line": template == "answer"},
        }
        for index, row in enumerate(rows)
    ]
    with replacing(path) as file:
        parquet.write_table(pa.Table.from_pylist(records), file)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Request:
    """A data set to prepare: its name, and a file or hub repository where it is not the known one."""

    name: str
    source: str | None = None


def parse_request(text: str) -> Request:
    """``NAME`` or ``NAME=FILE_OR_REPOSITORY``."""
    name, _, source = text.partition("=")
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise DataError(
            f"{text[:100]}: give NAME or NAME=FILE, with a name of at most 100 letters, digits, '-', '_' and '.'"
        )
    return Request(name, source or None)


def prepare(
    train: Sequence[Request],
    held_out: Sequence[Request],
    out: Path,
    template: str,
    revision: str | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Write ``out/NAME.parquet`` for every data set, and ``out/manifest.json``; returns the manifest's content.

    Training sets lose what they share with an evaluation set or an earlier training set.

    Raises:
        DataError: a source cannot be read, names repeat, or nothing is left of a set.
    """
    names = [request.name for request in (*train, *held_out)]
    if len(set(names)) < len(names):
        raise DataError(f"a name is given twice: {', '.join(names)}")
    if not names:
        raise DataError("nothing to prepare: give --train SET or --eval SET")
    say = progress or (lambda text: None)
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file: give a folder")
    manifest = out / "manifest.json"
    known = _known_sets(manifest)  # before the work: it may be damaged
    out.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    evaluation: dict[str, list[MathProblem]] = {}
    for request in held_out:
        entries[request.name], evaluation[request.name] = _one_set(request, template, revision, say, "evaluation", {})
    taken = dict(evaluation)
    prepared = dict(evaluation)
    for request in train:
        entries[request.name], rows = _one_set(request, template, revision, say, "training", taken)
        taken[request.name] = prepared[request.name] = rows
    for name, rows in prepared.items():
        if not rows:
            raise DataError(f"{name}: no problem is left")
        entries[name]["sha256"] = write(out / f"{name}.parquet", name, rows, template)
        say(f"{name}: wrote {out / name}.parquet")
    # Sets that an earlier command has put into the same folder stay known.
    content = {"sets": {**known, **entries}}
    write_atomically(manifest, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return {"sets": entries}


def _known_sets(manifest: Path) -> dict[str, Any]:
    if not manifest.exists():
        return {}
    remedy = "give a folder of data sets, or a new one, as --out"
    sets = read_json(manifest, remedy, "sets")["sets"]
    if not isinstance(sets, dict):
        raise DamagedFile(manifest, 1, "is damaged (sets is no object)", remedy)
    return sets


def _one_set(
    request: Request, template: str, revision: str | None, say: Any, role: str, known: dict[str, list[MathProblem]]
) -> tuple[dict[str, Any], list[MathProblem]]:
    say(f"{request.name}: reading {request.source or 'from the hub'}")
    loaded = load(request.name, request.source, revision)
    counts = Counts()
    rows = deduplicate(((cleaned(row), count) for row, count in distinct(request.name, loaded.rows, say)), counts)
    rows = remove_overlaps(rows, known, counts)
    repeated = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise DataError(f"{request.name}: two problems have the id {repeated[0]}; make ids unique, or leave them out")
    counts.kept = len(rows)
    content = "\n".join(json.dumps([row.problem, row.answer]) for row in rows)
    entry = {
        "role": role,
        "template": template,
        "prompt": TEMPLATES[template],
        "origin": loaded.origin,
        "content_sha256": hashlib.sha256(content.encode()).hexdigest(),
        **asdict(counts),
    }
    say(
        f"{request.name}: {counts.rows} rows, {counts.duplicates} duplicates, {counts.conflicting} with conflicting "
        f"answers, {counts.overlapping} in another set, {counts.kept} kept"
    )
    return entry, rows
