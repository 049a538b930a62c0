"""Answers a second on one core, with the median latency; the same texts through math-verify for comparison.

``pytest -s tests/grading/test_grading_speed.py`` prints the figures.
"""

import json
import os
import statistics
import time
from pathlib import Path

import pytest

from cppo_verl.grading import grade

DATA = os.environ.get("CPPO_DATA_DIR")
needs_data = pytest.mark.skipif(DATA is None, reason="CPPO_DATA_DIR is not set: the public data sets are not here")
WORK = "We compute step by step, and use that 2 + 3 = 5. " * 20


@pytest.fixture
def one_core():
    """This process and the grading workers it starts share one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def rate(check, pairs):
    """(answers a second, median seconds)."""
    seconds = []
    for text, gold in pairs:
        started = time.perf_counter()
        check(text, gold)
        seconds.append(time.perf_counter() - started)
    return len(seconds) / sum(seconds), statistics.median(seconds)


def boxed(answer):
    return f"{WORK}So the answer is $\\boxed{{{answer}}}$."


def test_integers(one_core):
    """The aim is 5,000 a second on an idle core; the bound leaves room for a machine that shares its cores."""
    rates = {}
    for name, offset in (("right", 0), ("wrong", 1)):
        pairs = [(boxed(number + offset), str(number)) for number in range(3000)]
        assert {grade(*pair).outcome for pair in pairs[:100]} == {name}
        rates[name], median = max(rate(grade, pairs) for _ in range(3))
        print(f"boxed integers, {name}: {rates[name]:,.0f} a second, median {1e6 * median:.0f} microseconds")
    assert min(rates.values()) > 2500


@needs_data
def test_other_answers_at_least_as_fast_as_math_verify(one_core):
    """Golds of MATH-500 that are not integers, right ones and the next problem's."""
    from math_verify import parse, verify

    def math_verify(text, gold):
        return verify(parse(f"\\boxed{{{gold}}}"), parse(text))

    lines = (Path(DATA) / "math500.jsonl").read_text().splitlines()
    golds = [gold for gold in (json.loads(line)["answer"] for line in lines) if not gold.lstrip("-").isdigit()]
    for name, offset in (("right", 0), ("wrong", 1)):
        pairs = [(boxed(golds[(i + offset) % len(golds)]), golds[i]) for i in range(len(golds))]
        for check in (grade, math_verify):  # what sympy imports when it first needs it
            rate(check, pairs[:60])
        pairs = pairs[60:]
        (own, median), (other, _) = rate(grade, pairs), rate(math_verify, pairs)
        print(
            f"other answers of MATH-500, {name} ({len(pairs)}): {own:,.0f} a second, median {1e3 * median:.1f} ms; "
            f"math-verify {other:,.0f}"
        )
        assert own > other
