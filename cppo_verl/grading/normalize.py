"""One spelling for an answer: markup, units and separators that carry no value are removed, in pure Python.

Also the two questions that need no algebra: is the answer too expensive to look at (`too_complex`), and is it one
value or several (`is_plural`). No expression here takes more than linear time: they run outside the process that may
be killed, so no white space is matched twice in a row and none in front of what is looked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

MAX_LENGTH = 500  # characters of an answer or a gold; the longest gold of MATH-500 has 53
MAX_NESTING = 16  # braces and brackets; the parser's cost explodes beyond about 50
MAX_EXPONENT_DIGITS = 4
MAX_FACTORIAL_DIGITS = 3

_MARKUP = r"\\(?:text(?:rm|bf|it|normal|sf|tt)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|bold(?:symbol)?|bm|operatorname)"
_POWER = r"(?:\s*\^\s*\{?[23]\}?)?"
# \boxed and its likes, up to their opening brace; \framebox may have a width and a position in front.
BOX = r"\\(?:boxed|fbox|framebox(?:\s*\[[^\[\]{}\\]*\]){0,2})\s*\{"
_WRAPPER = re.compile(rf"(?:{_MARKUP}\s*\{{|{BOX})([^{{}}]*)\}}")
_NESTED_BOX = re.compile(BOX)
# Words after a number that change its value or leave it open; any other word counts as a unit.
_NOT_UNITS = re.compile(
    r"hundred|thousand|[mbtr]illion|dozen|percent|per ?cent|pct|half|squared|cubed|factorial|root|mod|base|times|pi\b"
    r"|plus|minus|\b(?:and|or|not|more|less|fewer|than|least|most|greater|about|approx\w*|to|is|if|no)\b",
    re.IGNORECASE,
)
_DEGREES = re.compile(r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|(?:\^\s*)?°|\\degree)$")
_MARKED_UNIT = re.compile(rf"(?<=[0-9}}).a-zA-Z])\s*{_MARKUP}\s*\{{([A-Za-z ./~^0-9]*)\}}{_POWER}\s*$")
_BARE_UNIT = re.compile(rf"(?<=[0-9])\s+([A-Za-z]{{2,}}(?: [A-Za-z]+){{0,3}}){_POWER}\s*$")
_PERCENT = re.compile(rf"(?:\\?%|(?:{_MARKUP}\s*\{{\s*)?\b(?:percent(?:age)?|pct)\b\s*\}}?)$", re.IGNORECASE)

_ARGUMENT = r"([0-9A-Za-z]|\\pi(?![A-Za-z])|\{[^{}]*\})"  # of \frac, with or without braces


def _brace_fraction(found: re.Match[str]) -> str:
    top, bottom = (argument.strip("{}") for argument in found.groups())
    return rf"\frac{{{top}}}{{{bottom}}}"


_SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"[\u00a0\u2009\u202f\t\r\n]"), " "),
    # Separators inside a number that cannot be list commas: 1{,}234  1,\!234  1\,234
    (re.compile(r"(?<=[0-9])(?:\{\s*,\s*\}|,\\!|\\[,!])\s*(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\(?:left|right|[bB]ig{1,2}[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|\\(?:quad|qquad|thinspace)(?![A-Za-z])|~"), " "),
    (re.compile(r"\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]|\\?\$"), ""),
    (re.compile(r"^[€£¥]|[€£¥]$"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}"), _brace_fraction),
    (re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])"), ""),  # x \in [1, 2]
    (re.compile(r"_\s*\{\s*([A-Za-z0-9])\s*\}"), r"_\1"),
]

_SEVERAL = re.compile(
    r"[,;<>≤≥≠±&]|!=|\\(?:pm|mp|in|cup|cap|vee|wedge|lor|land|begin|setminus|lbrace|to|rightarrow)(?![A-Za-z])"
    r"|\\n?(?:le|ge|lt|gt|ne|leq|geq|neq|leqslant|geqslant|ll|gg)(?![A-Za-z])|\\\{"
    r"|(?<![A-Za-z])(?:and|or)(?![A-Za-z])"
)
_SET_OPENS, _SET_CLOSES = re.compile(r"\A\\(?:\{|lbrace(?![A-Za-z]))"), re.compile(r"\\(?:\}|rbrace)\Z")
_ARABIC = {"\u066a": "%", "\u066b": ".", "\u066c": ","}
_CHAIN = re.compile(r"[{(\[})\]]|(?<![<>!:])=|\\(?:approx|simeq)(?![A-Za-z])|≈")
# `5 7` renders as 57 and means neither that nor a sum; an exponent may stand before the next factor: 2^6 3^5.
_DIGIT_GAP = re.compile(r"(?<![\^_0-9])[0-9]+\s+[0-9]")


def clean(text: str) -> str:
    """The answer without layout markup, currency, units, thousands marks and a final full stop or backslash."""
    text = ascii_forms(text).strip()
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?:[.。]|(?<!\\)\\)$", "", text.strip().strip("*").strip()).rstrip()
    for _ in range(MAX_NESTING):
        if not _NESTED_BOX.search(text) or (unboxed := _WRAPPER.sub(r"\1", text)) == text:
            break
        text = unboxed
    if whole := _WRAPPER.fullmatch(text):
        text = whole[1].strip()
    return strip_unit(text)


def strip_unit(text: str) -> str:
    """The text without a final degree sign or unit, in markup (`5\\text{ cm}^2`) or after a space (`5 cm`)."""
    text = _without_degrees(text)
    for pattern in (_MARKED_UNIT, _BARE_UNIT):
        unit = pattern.search(text)
        if unit and not _NOT_UNITS.search(unit[1]):
            return _without_degrees(text[: unit.start()])
    return text


def _without_degrees(text: str) -> str:
    return _DEGREES.sub("", text.rstrip()).rstrip()


def split_percent(text: str) -> tuple[str, bool]:
    """(text without a final percent sign or word, whether there was one)."""
    found = _PERCENT.search(text := text.rstrip())
    return (text[: found.start()].rstrip(), True) if found else (text, False)


def split_chain(text: str) -> list[tuple[str, bool]]:
    """The sides of `a = b \\approx c`, each with whether it follows an "approximately" sign; one side without any sign.

    Only signs outside every bracket count, so that the index of a sum is left alone.
    """
    sides, depth, start, rounded = [], 0, 0, False
    for token in _CHAIN.finditer(text):
        if token[0] in "{([":
            depth += 1
        elif token[0] in "})]":
            depth -= 1
        elif depth == 0:
            sides.append((text[start : token.start()].strip(), rounded))
            start, rounded = token.end(), token[0] != "="
    return [*sides, (text[start:].strip(), rounded)]


def ascii_forms(text: str) -> str:
    """Digits of every script, and the fullwidth and Arabic signs that go with them, as ASCII has them.

    Not by a Unicode normal form, which would turn 5² into 52.
    """
    return text if text.isascii() else "".join(map(_ascii_form, text))


def _ascii_form(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if "\uff01" <= character <= "\uff5e":  # fullwidth
        return chr(ord(character) - 0xFEE0)
    return _ARABIC.get(character, character)


def without_set_of_one(text: str) -> str:
    """What stands in a set of one value, `5` in `\\{5\\}`; any other text unchanged."""
    opening, closing = _SET_OPENS.search(text), _SET_CLOSES.search(text)
    inner = text[opening.end() : closing.start()].strip() if opening and closing else ""
    return inner if inner and not is_plural(inner) and "\\mid" not in inner and "|" not in inner else text


def is_plural(text: str) -> bool:
    """Whether the text is a list, tuple, set, interval, matrix, inequality or plus-minus: not one number."""
    return _SEVERAL.search(text) is not None


def has_digit_gap(text: str) -> bool:
    """Whether two numbers stand side by side with nothing but a space between them."""
    return _DIGIT_GAP.search(text) is not None


def too_complex(text: str) -> str | None:
    """Why the text must not reach the parser, None if it may. One linear pass, before any algebra.

    What passes can still be expensive; the caps only keep the common bombs from costing a worker process each.
    """
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} characters"
    text = ascii_forms(text)
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        return f"nested deeper than {MAX_NESTING}"
    if re.search(r"[0-9)}]\s*\^\s*(?:\{[^{}]*[0-9)}]\s*\^|[0-9]\s*\^)", text):
        return "a power tower"
    if re.search(rf"\^\s*(?:[{{+-][-+\s]*)?[0-9]{{{MAX_EXPONENT_DIGITS + 1}}}", text):
        return f"an exponent of more than {MAX_EXPONENT_DIGITS} digits"
    if re.search(rf"[0-9]{{{MAX_FACTORIAL_DIGITS + 1}}}\s*(?:\)\s*)?!|!\s*(?:\)+\s*)?!", text):
        return f"a factorial of more than {MAX_FACTORIAL_DIGITS} digits"
    return None
