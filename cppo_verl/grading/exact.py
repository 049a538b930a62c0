"""Plain numbers in pure Python: covers nearly every DAPO and AIME answer without a worker process."""

from __future__ import annotations

import re
from fractions import Fraction

from cppo_verl.grading.normalize import MAX_LENGTH, split_percent, strip_unit

_GROUPS = r"[0-9]{1,3}(?:(?P<mark>[ ,])[0-9]{3})(?:(?P=mark)[0-9]{3})*"
_DECIMAL = re.compile(
    rf"(?P<whole>{_GROUPS}|[0-9]*)(?:\.(?P<tail>[0-9]*))?(?:\\(?:overline|bar)\{{(?P<repeat>[0-9]+)\}})?"
)
_FRACTION = re.compile(
    r"(?:(?P<whole>[0-9]+)(?:\s*(?=\\frac)|\s+))?"
    r"(?:\\frac\s*\{\s*(?:(?P<minus>-)\s*)?(?P<top>[0-9]+)\s*\}\s*\{\s*(?P<bottom>[0-9]+)\s*\}"
    r"|(?P<slash_top>[0-9]+)\s*/\s*(?P<slash_bottom>[0-9]+))"
)
_BASE = re.compile(r"([0-9]+)_\{?([0-9]+)\}?")


def number(text: str) -> Fraction | None:
    """The exact value of a plain number in a cleaned text: integer, decimal, fraction or mixed number, maybe a percent.

    A percent is its hundredth. Zero-padding and thousands marks are read; `0.333` is 333/1000, not 1/3. None for
    anything that needs algebra, for numbers in a stated base (see `based_digits`), and for over MAX_LENGTH characters.
    """
    if len(text) > MAX_LENGTH:
        return None
    text, percent = split_percent(text)
    text = strip_unit(text) if percent else text
    negative = text.startswith("-")
    text = text[1:].strip() if text[:1] in ("-", "+") else text.strip()
    value = _decimal(text)
    if value is None:
        value = _fraction(text)
    if value is None:
        return None
    return (-value if negative else value) / (100 if percent else 1)


def based_digits(text: str) -> tuple[str, str] | None:
    """(digits, base) of `4210_5` or `4210_{5}`, None for anything else."""
    found = _BASE.fullmatch(text)
    return (found[1].lstrip("0"), found[2]) if found else None


def _decimal(text: str) -> Fraction | None:
    found = _DECIMAL.fullmatch(text)
    if not found or not (found["whole"] or found["tail"]):
        return None
    whole, tail, repeat = (found[name] or "" for name in ("whole", "tail", "repeat"))
    if repeat and found["tail"] is None:
        return None
    value = Fraction(int(re.sub("[ ,]", "", whole) + tail or "0"), 10 ** len(tail))
    if repeat:
        value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(tail))
    return value


def _fraction(text: str) -> Fraction | None:
    found = _FRACTION.fullmatch(text)
    if not found:
        return None
    whole = int(found["whole"] or 0)
    top, bottom = int(found["top"] or found["slash_top"]), int(found["bottom"] or found["slash_bottom"])
    if bottom == 0 or (found["whole"] and (found["minus"] or top >= bottom)):  # 5\frac{5}{2} may be a product
        return None
    return whole + Fraction(-top if found["minus"] else top, bottom)
