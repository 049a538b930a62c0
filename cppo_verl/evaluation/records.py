"""The files of an evaluation as they are read: what has another shape than it should is named, with its line."""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cppo_verl.run.files import DamagedFile, numbered_lines, read_json

Record = TypeVar("Record")

# What a report reads of a manifest: names, and the type of each or what is in it.
_SHAPE: dict[str, Any] = {
    "settings": {
        "decoding": {"n": int},
        "model": {"name": str, "source": str, "sha256": str},
        "chat": {"arguments": dict, "template_sha256": str},
        "reward": {"path": str, "name": str},
        "questions": dict,
    },
    "attempts": list,
}
_ATTEMPT = {"packages": dict, "hardware": {"gpus": list}}


def read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """Raises DamagedFile where it lacks what a report reads."""
    manifest = read_json(path, remedy, "settings", "attempts")
    lacking = [*_lacking(manifest, _SHAPE)]
    if not lacking:
        for attempt in manifest["attempts"]:
            lacking += _lacking(attempt, _ATTEMPT, "attempts.") if isinstance(attempt, dict) else ["attempts"]
    if lacking:
        raise DamagedFile(path, 1, f"has no usable {lacking[0]}", remedy)
    return manifest


def _lacking(content: dict[str, Any], shape: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names that are missing, of another type, or a number of samples below one."""
    for name, wanted in shape.items():
        value = content.get(name)
        if isinstance(wanted, dict) and isinstance(value, dict):
            yield from _lacking(value, wanted, f"{prefix}{name}.")
        elif isinstance(wanted, dict) or not isinstance(value, wanted) or (wanted is int and value < 1):
            yield prefix + name


def read_records(path: Path, kind: type[Record], remedy: str) -> list[Record]:
    """The lines as instances of a dataclass. Raises DamagedFile for other fields, or values of another type."""
    types = {name: _runtime_types(hint) for name, hint in get_type_hints(kind).items()}
    found, what = [], f"is no {kind.__name__.lower()} of an evaluation"
    for number, line in numbered_lines(path):
        try:
            found.append(kind(**line))
        except TypeError:
            raise DamagedFile(path, number, what, remedy) from None
        for name, value in line.items():
            if not isinstance(value, types[name]):
                raise DamagedFile(path, number, f"{what} ({name} has another type)", remedy)
    return found


def _runtime_types(hint: Any) -> tuple[type, ...]:
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(part) or part for part in parts)
