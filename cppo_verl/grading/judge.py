"""The algebra: math-verify on one cleaned answer at a time. Imported by the worker process only; it may hang."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Float, Rational

# One warning per process that its signal-based time limit is off, which is the point: the pool kills the process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Units are stripped before (math-verify's own list holds single letters, and would read 2t as 2), and nothing but the
# one box is looked at.
_ONE_BOX = LatexExtractionConfig(
    try_extract_without_anchor=False,
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    ),
)


def judge(gold: str, sides: Sequence[tuple[str, bool]]) -> bool:
    """Whether the sides of an answer (see `normalize.split_chain`) all state the gold.

    Of a chain, the sides that are numbers must all equal a gold that is one; names (`x = 34`, `m+n = 34`) are free.
    With a gold in symbols every side after the first must equal it. A side after an "approximately" sign must round
    from the gold, and counts exactly where there is no exact side.

    Raises:
        ValueError: the gold cannot be parsed, so that no answer could ever be right.
    """
    truth = _parse(gold)
    if truth is None:
        raise ValueError(f"gold {gold!r} cannot be parsed")
    values = [_parse(text) for text, _ in sides]
    if len(sides) == 1:
        return _same(truth, values[0])
    if any(value is None for value in values[1:]):
        return False
    claims = [(value, *side) for value, side in zip(values, sides, strict=True)]
    claims = [claim for claim in claims if _is_number(claim[0])] if _is_number(truth) else claims[1:]
    if all(rounded for *_, rounded in claims):
        return bool(claims) and all(_same(truth, value) for value, *_ in claims)
    return all(_rounds_to(truth, value, text) if rounded else _same(truth, value) for value, text, rounded in claims)


@functools.lru_cache(maxsize=4096)  # the samples of a group share their gold, and many of them their answer
def _parse(text: str) -> Any:
    """The sympy object of one answer with exact numbers, None where the text is not mathematics."""
    found = parse(f"\\boxed{{{text}}}", [_ONE_BOX], fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        return None
    # math-verify rounds to six digits as soon as one side holds a float, and would accept 0.333333 for 1/3.
    floats = found[0].atoms(Float)
    return found[0].xreplace({value: Rational(str(value)) for value in floats}) if floats else found[0]


def _same(truth: Any, value: Any) -> bool:
    if value is None:
        return False
    try:
        return verify(truth, value, timeout_seconds=None, raise_on_error=True)
    except Exception:
        # One of its strategies failed. Another may prove the answer right; without that the failure is the grader's,
        # and counted as such.
        if verify(truth, value, timeout_seconds=None):
            return True
        raise


def _is_number(value: Any) -> bool:
    return bool(getattr(value, "is_number", False))


def _rounds_to(truth: Any, value: Any, text: str) -> bool:
    """Whether the value is the truth to within one unit of the last decimal written (rounded or cut off)."""
    if not (_is_number(truth) and _is_number(value)):
        return False
    return bool(abs(truth - value).evalf() <= 10.0 ** -len(text.partition(".")[2]))
