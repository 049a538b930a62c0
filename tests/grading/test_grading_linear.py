"""Whatever the grader does outside the process that may be killed takes linear time, to 100,000 characters."""

import itertools
import re
import time
from functools import partial

import pytest

from cppo_verl.grading import exact, extract, grade, grader, normalize

MODULES = (normalize, exact, extract, grader)
# Only ever asked whether a text begins with them, or is one.
ANCHORED = ("_BASE", "_DECIMAL", "_DISPLAY", "_FRACTION", "_LETTERS", "_NAME", "_WORD")
STARTS = ("", "5", "5 ab", "(", "^", "1^{", "!", "_", r"\frac{", r"\text", r"\framebox", "answer", "the")
REPEATED = (
    " ", "1", "1 ", "a", "a ", "{", "}", "(", ")", ",", ".", "^", "!", "=", "*", "\\", "\n", "- ", "%", "[", "° ",
    "% ", r"\text{", r"\boxed{", r"\fbox", r"\framebox[", r"\frac{", r"\frac{1", "percent", " percent ", "5 a",
    r"\circ", "1^1", r"\{", r"\}", "[,",
)  # fmt: skip
ENDS = ("", "x")


def shape(start, piece, end, length):
    return start + piece * (length // len(piece)) + end


def expressions():
    """Every compiled expression of the modules, and the functions that hold others."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                found[name] = value
    found |= {f"_SPELLINGS[{place}]": pattern for place, (pattern, _) in enumerate(normalize._SPELLINGS)}
    calls = {name: partial(every_match, pattern) for name, pattern in found.items() if name not in ANCHORED}
    calls |= {f"{name} at the start": found[name].match for name in ANCHORED}
    calls |= {f"{name} alone": found[name].fullmatch for name in ANCHORED}
    functions = (
        normalize.clean, normalize.strip_unit, normalize.split_percent, normalize.split_chain, normalize.too_complex,
        normalize.without_set_of_one, normalize.ascii_forms, extract.final_answer, grader._squashed, grader._is_tuple,
    )  # fmt: skip
    calls |= {function.__name__: function for function in functions}
    return calls | {"final_answer of a line": partial(extract.final_answer, answer_line=True)}


def every_match(pattern, text):
    for _ in pattern.finditer(text):
        pass


def seconds(call, text):
    times = []
    for _ in range(2):
        started = time.process_time()
        call(text)
        times.append(time.process_time() - started)
    return min(times)


def slower(call, sizes=(1_000, 10_000, 100_000)):
    """The shape and sizes at which ten times the characters take over forty times as long; None where there is none."""

    def first(case):
        started = time.process_time()
        call(shape(*case, sizes[0]))
        return time.process_time() - started

    for case in sorted(itertools.product(STARTS, REPEATED, ENDS), key=first)[-3:]:
        before = None
        for size in sizes:
            now = seconds(call, shape(*case, size))
            if before is not None and now > 40 * max(before, 5e-4):
                return case, size, before, now
            before = now
    return None


@pytest.fixture
def no_cap(monkeypatch):
    monkeypatch.setattr(normalize, "MAX_LENGTH", 1 << 30)


@pytest.mark.parametrize("name", expressions())
def test_no_expression_is_worse_than_linear(no_cap, name):
    assert slower(expressions()[name]) is None


@pytest.mark.parametrize("pattern", [r"\s*%\s*$", r"[0-9]{4,}\s*!", r"\(.*,.*\)"])
def test_worse_ones_are_seen(pattern):
    """White space in front of an anchor, a run that is tried from each of its places, two of anything."""
    assert slower(partial(every_match, re.compile(pattern)), (1_000, 10_000)) is not None


def test_gold_and_answer_of_any_length_get_a_verdict_at_once():
    """A gold of over 500 characters could not be matched by an answer that is graded: the data is at fault."""
    for piece in (" ", "9", "{", "percent ", r"\boxed{"):
        long = "5" + piece * (100_000 // len(piece)) + "x"
        times = [time.process_time()]
        assert grade(r"\boxed{5}", long).outcome == "error"
        assert grade(rf"\boxed{{{'5' + piece * 60 + 'x'}}}", "5").outcome in ("wrong", "error", "no_answer")
        times.append(time.process_time())
        assert times[1] - times[0] < 6
