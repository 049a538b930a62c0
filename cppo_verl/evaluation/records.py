"""The files of an evaluation as they are read: damaged ones are named, with the line and what is wrong in it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from cppo_verl.problems import ConfigError
from cppo_verl.run.log import json_object, read_lines

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


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ConfigError where it is damaged, or lacks what a report reads."""
    manifest = json_object(path.read_bytes(), str(path))
    lacking = [*_lacking(manifest, _SHAPE)]
    if not lacking:
        for attempt in manifest["attempts"]:
            lacking += _lacking(attempt, _ATTEMPT, "attempts.") if isinstance(attempt, dict) else ["attempts"]
    if lacking:
        raise ConfigError(f"{path}: damaged, it has no usable {lacking[0]}")
    return manifest


def _lacking(content: dict[str, Any], shape: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names that are missing, of another type, or a number of samples below one."""
    for name, wanted in shape.items():
        value = content.get(name)
        if isinstance(wanted, dict) and isinstance(value, dict):
            yield from _lacking(value, wanted, f"{prefix}{name}.")
        elif isinstance(wanted, dict) or not isinstance(value, wanted) or (wanted is int and value < 1):
            yield prefix + name


def read_records(path: Path, kind: Callable[..., Any]) -> list[Any]:
    """The lines as instances of a dataclass. Raises ConfigError for other fields, or values of another type."""
    types = {name: _runtime_types(hint) for name, hint in get_type_hints(kind).items()}
    found = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            found.append(kind(**line))
        except TypeError as error:
            reason = str(error).partition("__init__() ")[2] or str(error)
            raise ConfigError(f"{path}, line {number}: damaged, {reason}") from None
        for name, value in line.items():
            if not isinstance(value, types[name]):
                raise ConfigError(f"{path}, line {number}: damaged, {name} has another type")
    return found


def _runtime_types(hint: Any) -> tuple[type, ...]:
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(part) or part for part in parts)
