"""Secrets: which variables are, what of a command is written down, how workers of a running cluster get them.

They never travel in settings, Ray's runtime_env or logs: a process has them in its environment, or reads them from a
file of the run that its user alone can read.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cppo_verl.run.supervisor import RUN_FOLDER
from cppo_verl.run.terminal import warn

FILE = ".private-variables.json"

# The function that a worker runs first, as Ray's worker_process_setup_hook names it.
RECEIVE = "cppo_verl.run.confidential.receive"

# Anywhere in a name, whatever its case.
_INSIDE = re.compile(r"PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|SECRET|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY")
_TOKEN = re.compile(r"(?:^|_)(?:HF|HUB|AUTH|ACCESS|API|BEARER|GITHUB|WANDB)_TOKEN$")
# Of variables of the environment only: settings have names such as eos_token and prompt_key.
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY)$")
_URL_LOGIN = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")
_FLAGS = ("", "0", "1", "true", "false", "none", "null")
# Shorter values are words that may stand anywhere.
_SHORTEST = 8
_REMOVED = "***"


def is_secret(name: str, value: object) -> bool:
    """Whether a variable or setting of this name and value is one; flags such as ``true`` never are."""
    if not isinstance(value, str) or value.strip().lower() in _FLAGS:
        return False
    return _by_name(name) or bool(_URL_LOGIN.search(value))


def _by_name(name: str) -> bool:
    upper = re.sub(r"[^A-Z0-9]+", "_", name.upper())
    return bool(_INSIDE.search(upper) or _TOKEN.search(upper) or (name.isupper() and _VARIABLE.search(name)))


def _values(environment: Mapping[str, str]) -> list[str]:
    """The values of secret variables, longest first; a file that holds a secret is none."""
    secrets = (value for name, value in environment.items() if is_secret(name, value))
    return sorted({v for v in secrets if len(v) >= _SHORTEST and not os.path.exists(v)}, key=len, reverse=True)


def secrets_in(settings: Any, environment: Mapping[str, str], key: str = "") -> Iterator[str]:
    """Dotted names of the settings that are secrets, by their own name or because they hold a secret variable's value.

    Args:
        settings: plain dicts and lists, resolved.
        environment: this process's variables.
    """
    known = _values(environment)
    for path, value in _leaves(settings, key):
        if is_secret(path.rpartition(".")[2], value) or (isinstance(value, str) and any(v in value for v in known)):
            yield path


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value); an item of a list has the list's name, a key of a dict is a value as well."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node


def redacted(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """A command as it may be written down: ``NAME=***`` for secrets, also where only the value shows that it is one."""
    known = _values(environment)
    return [_redacted(word, known) for word in words]


def _redacted(word: str, known: Sequence[str]) -> str:
    for value in known:
        word = word.replace(value, _REMOVED)
    name, separator, value = word.partition("=")
    setting = name.rpartition(".")[2].lstrip("+~")
    if separator and _by_name(setting) and is_secret(setting, value):
        word = f"{name}={_REMOVED}"
    return _URL_LOGIN.sub(_REMOVED, word)


@contextmanager
def shared(folder: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """While inside, ``folder`` (on the disk that all nodes see) holds the variables in a file of mode 0600."""
    file = folder / FILE
    file.unlink(missing_ok=True)  # of a killed attempt
    if not variables:
        yield
        return
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump(dict(variables), opened)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def receive() -> None:
    """In a new worker of a running cluster: take the variables that the run's user has given the run."""
    file = Path(os.environ.get(RUN_FOLDER, "")) / FILE
    try:
        os.environ.update(json.loads(file.read_text()))
    except OSError as error:
        warn(f"cppo: {file} cannot be read on this node ({error.strerror})")
