"""Where the answer stands in a response: the last box, or the last `Answer:` line where the prompt asked for one."""

from __future__ import annotations

import re

from cppo_verl.grading.normalize import BOX

# Escaped characters are consumed as one token, so that `\{` and `\}` are not counted as braces. The doubled backslash
# of a response that went through JSON is taken as one.
_BRACES = re.compile(rf"(?P<box>\\?{BOX})|\\.|(?P<open>\{{)|(?P<close>\}})", re.DOTALL)

# A line that starts with "Answer:", with the Markdown that models put around it: `**Answer:** 34`, `### Answer: 34`.
# One character class per run: nested repetitions take exponential time on a line of stars.
_ANSWER_LINE = re.compile(
    r"^[ \t>#*_\-]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_]*:",
    re.IGNORECASE | re.MULTILINE,
)
_DISPLAY = re.compile(r"\s*(?:\$\$(?P<dollars>.*?)\$\$|\\\[(?P<brackets>.*?)\\\])", re.DOTALL)


def final_answer(response: str, *, answer_line: bool = False) -> str | None:
    """The text the response commits to, without surrounding white space; None where there is none.

    Everything up to the last `</think>` is left out. There is no fallback to "some number in the text": it would pay
    for unfinished responses. With `answer_line`, whichever of box and line comes last counts; a box on the line is the
    answer of that line.
    """
    text = response.rpartition("</think>")[2]
    box = _last_box(text)
    line = _last_answer_line(text) if answer_line else None
    if line is not None and (box is None or box[0] < line[0]):
        return line[1] or None
    return (box[1].strip() or None) if box else None


def _last_box(text: str) -> tuple[int, str] | None:
    """(position, content) of the balanced box that closes last; of nested boxes this is the outer one."""
    opened: list[tuple[bool, int, int]] = []  # is it a box, where it starts, where its content starts
    last = None
    for token in _BRACES.finditer(text):
        if token["box"] or token["open"]:
            opened.append((token["box"] is not None, token.start(), token.end()))
        elif token["close"] and opened:
            is_box, start, content = opened.pop()
            if is_box:
                last = (start, text[content : token.start()])
    return last


def _last_answer_line(text: str) -> tuple[int, str] | None:
    """(position, content) of the last answer line; the position is its end, so that a box on it is not a later one."""
    markers = list(_ANSWER_LINE.finditer(text))
    if not markers:
        return None
    # The DAPO prompt can be read as "on its own line after Answer:", so an empty rest means the next line with text.
    rest = re.sub(r"^[\s*_]+", "", text[markers[-1].end() :])
    display = _DISPLAY.match(rest)
    content = (display["dollars"] or display["brackets"] or "") if display else rest.partition("\n")[0]
    end = len(text) - len(rest) + (display.end() if display else len(content))
    box = _last_box(content)
    return end, (box[1] if box else content.strip().strip("*_")).strip()
