"""What is wrong with what a person has asked for, as values and as an error."""

from collections.abc import Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One setting, or one thing that settings name, that cannot work."""

    key: str
    """The setting's name, e.g. ``method.delta``; "model", "data file", "wandb login", "versions" for things outside."""
    text: str
    """What is wrong and what to do, in one line that names the setting."""
    only_here: bool = False
    """It is none on a machine that has what this one lacks."""


def about(key: str, text: str, only_here: bool = False) -> Problem:
    """The problem of a setting whose line begins with its name, e.g. ``about("run.name", "=a/b: a plain ...")``."""
    return Problem(key, key + text, only_here)


class ConfigError(ValueError):
    """Something cannot work as it was asked for; the message, a line a problem, says what is wrong and what to do."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "ConfigError":
        return cls("\n".join(problem.text for problem in problems), problems)
