"""Files that decide something: a crash leaves the old text or the new one, and damage is named by file and line.

Standard library only.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cppo_verl.problems import ConfigError


class DamagedFile(ConfigError):
    """A file that is empty, cut off or holds something else; the message begins with its path and line."""

    def __init__(self, path: Path, line: int, what: str, remedy: str) -> None:
        super().__init__(f"{path}:{line}: {what}; {remedy}")
        self.path, self.line = path, line


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: whoever is killed, and if the power fails, readers find the old text or the new."""
    with replacing(path) as file:
        file.write(text.encode())


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file in one step."""
    with replacing(path) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in records)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside ``path`` that takes its place, on disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a JSON line, on disk when this returns, or not at all; a last line that a kill cut off goes first."""
    new = not path.exists()
    with open(path, "ab+") as file:
        end = _end_of_lines(file)
        try:
            file.truncate(end)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk takes a part of the line
            os.ftruncate(file.fileno(), end)
            raise
    if new:
        _sync_folder(path.parent)


def _end_of_lines(file: IO[bytes]) -> int:
    """Where the last complete line ends."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def sync_tree(folder: Path) -> None:
    """Have every file below ``folder`` on disk, and the names of all."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names):
            if path.is_symlink():
                continue
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some network file systems know no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path, remedy: str, *required: str) -> dict[str, Any]:
    """The object in a JSON file, which has the ``required`` keys.

    Args:
        remedy: what to do where the file is damaged.

    Raises:
        DamagedFile: it is empty, no JSON object, or lacks a key.
    """
    data = path.read_bytes()
    content = _object(data, path, 1, remedy)
    for name in required:
        if name not in content:
            raise DamagedFile(path, 1 + data.rstrip().count(b"\n"), f"lacks {name}", remedy)
    return content


def read_lines(path: Path, say: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that was cut off by a crash is left out (``say`` is told).

    Raises:
        DamagedFile: another line is no JSON object.
    """
    return (record for _, record in numbered_lines(path, say))


def numbered_lines(path: Path, say: Callable[[str], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """:func:`read_lines` with each record's line number, from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, parse_line(line, path, number)
            elif say is not None:
                say(f"{path}:{number}: the last line was cut off and is left out")


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The record in one complete line of a JSON-lines file. Raises DamagedFile."""
    return _object(line, path, number, "mend or delete that line")


def _object(data: bytes, path: Path, line: int, remedy: str) -> dict[str, Any]:
    """The JSON object that ``data`` is, which begins at ``line`` of the file."""
    if not data.strip():
        raise DamagedFile(path, line, "is empty", remedy)
    try:
        content = json.loads(data.rstrip())
    except json.JSONDecodeError as error:
        raise DamagedFile(path, line + error.lineno - 1, f"is damaged ({error.msg})", remedy) from None
    except UnicodeDecodeError as error:
        number = line + data[: error.start].count(b"\n")
        raise DamagedFile(path, number, "is damaged (not text)", remedy) from None
    except RecursionError:
        raise DamagedFile(path, line, "is damaged (too deeply nested)", remedy) from None
    except ValueError:
        raise DamagedFile(path, line, "is damaged (a number of thousands of digits)", remedy) from None
    if not isinstance(content, dict):
        raise DamagedFile(path, line, "is damaged (no JSON object)", remedy)
    return content
