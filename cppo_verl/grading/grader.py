"""`grade`: from a response and a gold answer to one of five outcomes."""

from __future__ import annotations

import functools
import logging
import re
from typing import Literal, NamedTuple, get_args

from cppo_verl.grading.exact import based_digits, number
from cppo_verl.grading.extract import final_answer
from cppo_verl.grading.normalize import (
    MAX_LENGTH,
    clean,
    has_digit_gap,
    is_plural,
    split_chain,
    split_percent,
    too_complex,
    without_set_of_one,
)
from cppo_verl.grading.pool import WorkerTimeout, ask

Outcome = Literal["right", "wrong", "no_answer", "timeout", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

_log = logging.getLogger(__name__)
_WORD = re.compile(r"[A-Za-z]{2,}(?:[ -][A-Za-z]+)*")
_NAME = re.compile(r"[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\([A-Za-z]\))?")
_LETTERS = re.compile(r"[A-Za-z() ]+")


class Grade(NamedTuple):
    """What a response is worth: only "right" scores, every other outcome is a rate to watch."""

    outcome: Outcome
    """no_answer: nothing extracted. timeout: the algebra took too long. error: the grader failed, or refused an answer
    that is over its caps on length, nesting, exponents."""
    answer: str | None
    """What was extracted from the response, verbatim; None where nothing was."""


def grade(response: object, gold: object, *, answer_line: bool = False, timeout: float = 5.0) -> Grade:
    """Grade one response against the gold answer. Safe from any thread; blocks, so call it in an executor from asyncio.

    Args:
        response: the text a model wrote. None is a response without an answer, any other non-text an error.
        gold: the reference answer, as text or number.
        answer_line: the prompt asked for a last line "Answer: ..."; such a line then counts beside `\\boxed{}`.
        timeout: seconds of algebra, counted from its start; waiting for a free worker is not counted.

    Never raises: what goes wrong inside is logged once per message and is the outcome "error".
    """
    answer = None
    try:
        if response is not None and not isinstance(response, str):
            raise TypeError(f"a response must be text, got {type(response).__name__}")
        answer = final_answer(response, answer_line=answer_line) if response else None
        return Grade(_outcome(answer, str(gold), timeout) if answer else "no_answer", answer)
    except WorkerTimeout:
        return Grade("timeout", answer)
    except Exception as error:  # the one place that may catch; the outcome counts what it caught
        _report_once(f"{type(error).__name__}: {error}")
        return Grade("error", answer)


def _outcome(answer: str, gold: str, timeout: float) -> Outcome:
    if too_complex(answer):
        return "error"
    stated = final_answer(gold) or gold  # some golds are whole solutions with a box
    if len(stated) > MAX_LENGTH:
        raise ValueError(f"the gold answer is longer than {MAX_LENGTH} characters")
    text, truth = clean(answer), clean(stated)
    if not truth:
        raise ValueError("the gold answer is empty")
    if not is_plural(truth):
        text = without_set_of_one(text)
    if not text:
        return "no_answer"
    verdict = _without_algebra(text, truth, gold)
    if verdict is None:
        verdict = _with_algebra(text, truth, timeout)
    return "right" if verdict else "wrong"


def _without_algebra(text: str, truth: str, gold: str) -> bool | None:
    """The verdict where spelling, plain numbers or the shape of the answer decide; None where algebra is needed."""
    if _squashed(text) == _squashed(truth):
        return True
    if _WORD.fullmatch(truth):
        if text.casefold() == truth.casefold():
            return True
        if "\\text" in gold or "\\mbox" in gold:  # a gold like `abc` may be a product, `\text{east}` is a word
            return False
    if truth_digits := based_digits(truth):
        digits = based_digits(text) or (text.lstrip("0"), truth_digits[1])
        return digits == truth_digits
    if based_digits(text):
        return False
    value, truth_value = number(text), number(truth)
    if value is not None and truth_value is not None:
        return value == truth_value
    if has_digit_gap(text) or (is_plural(text) and not is_plural(truth)):
        return False
    # Comparing a set or a point with one value, or a letter with a number, is what algebra takes longest for.
    if (_is_tuple(truth) and not is_plural(text)) or (truth_value is not None and _LETTERS.fullmatch(text)):
        return False
    return None


def _with_algebra(text: str, truth: str, timeout: float) -> bool:
    """math-verify's verdict in a worker process. Raises what `pool.ask` raises, RuntimeError for a failure in there."""
    sides = [(text, False)]
    truth_sides = split_chain(truth)
    if len(truth_sides) == 2 and _NAME.fullmatch(truth_sides[0][0]) and not is_plural(truth):  # `x = 5` is 5
        truth_sides = truth_sides[1:]
    if len(truth_sides) == 1 and not is_plural(truth):
        truth = truth_sides[0][0]
        sides = split_chain(text)
    reply = ask(
        {"gold": _percent_as_fraction(truth), "sides": [(_percent_as_fraction(side), about) for side, about in sides]},
        timeout,
    )
    if "error" in reply:
        raise RuntimeError(f"{reply['error']} (answer {text!r}, gold {truth!r})")
    return reply["right"]


def _percent_as_fraction(text: str) -> str:
    bare, percent = split_percent(text)
    return rf"\frac{{{bare}}}{{100}}" if percent else text


def _squashed(text: str) -> str:
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", " ".join(text.split()))  # but `5 7` is not 57


def _is_tuple(text: str) -> bool:
    """An interval, a point, a union of intervals."""
    return text[:1] in ("(", "[") and text[-1:] in (")", "]") and "," in text[1:-1]


@functools.lru_cache(maxsize=256)
def _report_once(message: str) -> None:
    # Not a warning: importing verl's vLLM server raises the root logger's level to ERROR.
    _log.error("grading failed: %s", message)
