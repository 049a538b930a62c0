# ruff: noqa: RUF001
"""Verdicts: spellings that mean the gold, look-alikes that do not, and the public data."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from cppo_verl.grading import OUTCOMES, Grade, compute_score, grade, grader

RIGHT = [
    ("34.0", "34"), ("34.", "34"), ("025", "25"), ("25", "025"), ("+34", "34"), ("\\$34", "34"), ("\\text{34}", "34"),
    ("1,234", "1234"), ("1\\,234", "1234"), ("1{,}234", "1234"), ("1 234", "1234"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"), ("58500", "58,500"), ("336^\\circ", "336"), ("336", "336^{\\circ}"),
    ("34\\text{ cm}^2", "34"), ("34 cm", "34"), ("15", "15\\mbox{ cm}^2"),
    ("\\dfrac{270}{7}", "\\frac{270}7\\text{ degrees}"),
    ("0.5", "1/2"), ("\\frac12", "0.5"), ("9/5", "1\\frac{4}{5}"), ("1 4/5", "1.8"), ("\\frac{-1}{2}", "-0.5"),
    ("0.\\overline{3}", "\\frac{1}{3}"), ("34\\%", "0.34"), ("34\\%", "\\frac{17}{50}"), ("28\\%", "28\\%"),
    ("x = 34", "34"), ("34 = x", "34"), ("m+n = 25+9 = 34", "34"), ("P(3) = 34", "34"), ("\\boxed{34}", "34"),
    ("2 \\cdot 17", "34"), ("\\sum_{k=1}^{8} k - 2", "34"), ("\\sqrt{20}", "2\\sqrt{5}"),
    ("\\frac{\\sqrt{3}}{3} \\approx 0.577", "\\frac{\\sqrt{3}}{3}"), ("f(x) = 3 + 2x", "2x+3"),
    ("5", "x=5"), ("y=3+2x", "y = 2x + 3"),
    ("52_{8}", "52_8"), ("52", "52_8"), ("evelyn", "\\text{Evelyn}"), ("C", "\\text{(C)}"),
    ("7, 5, 3", "3, 5, 7"), ("3-2\\sqrt2, 3+2\\sqrt2", "3 \\pm 2 \\sqrt{2}"), ("[-2, 7]", "x \\in [-2,7]"),
    ("\\left(3,\\frac\\pi2\\right)", "\\left( 3, \\frac{\\pi}{2} \\right)"), ("34", "so it is \\boxed{34}."),
    ("３４", "34"), ("٣٤", "34"), ("३४", "34"), ("34", "３４"), ("－３．５", "-3.5"), ("１，２３４", "1234"),
    ("٣٫٥", "3.5"), ("３４％", "0.34"), ("\\{34\\}", "34"), ("\\{34\\}", "x=34"), ("\\{\\frac12\\}", "0.5"),
    ("\\fbox{34}", "34"), ("\\framebox[3cm][c]{34}", "34"),
]  # fmt: skip

WRONG = [
    ("35", "34"), ("-34", "34"), ("340", "34"), ("34!", "34"), ("34i", "34"), ("0.34", "34"), ("(34", "34"),
    ("35 = 34", "34"), ("34 = 35", "34"), ("2x = 34 = 35", "34"), ("34 \\approx 35.5", "34"), ("34\\%", "34"),
    ("34", "34\\%"), ("\\geq 34", "34"), ("x < 34", "34"), ("34, 34", "34"), ("34, 35", "34"), ("\\{34,35\\}", "34"),
    ("\\{35\\}", "34"), ("\\{34\\}", "\\{34,35\\}"),
    ("\\pm 34", "34"), ("34 \\text{ or } 35", "34"), ("34 \\text{ or more}", "34"), ("34\\text{ thousand}", "34"),
    ("34 million", "34"), ("\\text{not } 34", "34"), ("\\text{none}", "34"), ("5 7", "12"), ("5 7", "57"),
    ("5  7", "57"), ("5\\ \\, 7", "57"), ("５²", "52"), ("½", "12"), ("３５", "34"), ("٣ ٤", "34"),
    ("1\\,234", "235"), ("2t", "2"), ("34t", "34"), ("0.333", "\\frac13"), ("0.333333333333", "1/3"),
    ("1.41421356", "\\sqrt{2}"), ("1.4142135623730951", "\\sqrt{2}"), ("3.14159265", "\\pi"),
    ("52_7", "52_8"), ("52_8", "52"), ("42", "52_8"), ("east", "\\text{seat}"), ("1, 2", "(1,2,3)"),
    ("\\cos(x) = \\frac12", "\\sin(x) = \\frac12"), ("(-3,2)", "[-3,2]"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), RIGHT, ids=[f"{a} is {g}" for a, g in RIGHT])
def test_right(answer, gold):
    assert grade(f"so \\boxed{{{answer}}}", gold).outcome == "right"


@pytest.mark.parametrize(("answer", "gold"), WRONG, ids=[f"{a} is not {g}" for a, g in WRONG])
def test_wrong(answer, gold):
    assert grade(f"so \\boxed{{{answer}}}", gold).outcome == "wrong"


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (r"\boxed{34}", 34, Grade("right", "34")),
        (r"\boxed{ 034 }", "34", Grade("right", "034")),
        (None, "34", Grade("no_answer", None)),
        ("", "34", Grade("no_answer", None)),
        ("34", "34", Grade("no_answer", None)),
        (b"\\boxed{34}", "34", Grade("error", None)),
        (r"\boxed{34}", "", Grade("error", "34")),
        (r"\boxed{34 + 0}", r"\begin{cases} a = 1", Grade("error", "34 + 0")),
        ("\\boxed{\x00\ud800\u0664}", "34", Grade("wrong", "\x00\ud800\u0664")),
    ],
    ids=["int gold", "verbatim answer", "None", "empty", "no box", "bytes", "no gold", "unparsable gold", "garbage"],
)
def test_outcomes(response, gold, expected):
    assert grade(response, gold) == expected


SCORES = {
    "right": (r"\boxed{34}", "34"),
    "wrong": (r"\boxed{35}", "34"),
    "no_answer": ("34", "34"),
    "timeout": (r"\boxed{\binom{1000000000}{500000000}}", "34"),
    "error": (r"\boxed{9^{9^9}}", "34"),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_compute_score_has_the_same_float_keys_for_every_outcome(outcome):
    result = compute_score("any", *SCORES[outcome], {"index": 3}, timeout=0.5, reward_router_address=None)
    flags = {f"grade_{name}": float(name == outcome) for name in OUTCOMES if name != "right"}
    assert result == {"score": float(outcome == "right"), "acc": float(outcome == "right"), **flags}
    assert all(type(value) is float for value in result.values())


def test_compute_score_reads_the_answer_line_option_from_the_row_first():
    assert compute_score("dapo", "Answer: 34", "34")["grade_no_answer"] == 1.0
    assert compute_score("dapo", "Answer: 34", "34", {"answer_line": True})["score"] == 1.0
    assert compute_score("dapo", "Answer: 34", "34", None, answer_line=True)["score"] == 1.0
    assert compute_score("dapo", "Answer: 34", "34", {"answer_line": False}, answer_line=True)["score"] == 0.0


def test_importing_the_package_loads_no_algebra():
    code = "import sys, cppo_verl.grading; print({'sympy', 'math_verify', 'torch', 'numpy'} & set(sys.modules))"
    root = pathlib.Path(grader.__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "set()"


def _rows(name):
    folder = os.environ.get("CPPO_DATA_DIR")
    if not folder:
        pytest.skip("CPPO_DATA_DIR is not set: it names the folder with math500.jsonl, dapo_math_17k.jsonl, ...")
    return [json.loads(line) for line in (pathlib.Path(folder) / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["aime24", "aime25", "aime26", "dapo_math_17k"])
def test_every_gold_of_an_integer_set_is_right_and_its_successor_wrong(name):
    golds = [row["answer"] for row in _rows(name)]
    assert [g for g in golds if grade(f"\\boxed{{{g}}}", g).outcome != "right"] == []
    assert [g for g in golds if grade(f"\\boxed{{{int(g) + 1}}}", g).outcome != "wrong"] == []


def test_every_gold_of_math500_is_right_even_through_the_algebra(monkeypatch):
    golds = [row["answer"] for row in _rows("math500")]
    assert [g for g in golds if grade(f"\\boxed{{{g}}}", g).outcome != "right"] == []
    monkeypatch.setattr(grader, "_without_algebra", lambda *_: None)
    assert [g for g in golds if grade(f"\\boxed{{{g}}}", g).outcome != "right"] == []


def test_no_gold_of_math500_is_right_for_another_problem():
    golds = [row["answer"] for row in _rows("math500")]
    pairs = [(golds[i], golds[(7 * i + 3) % len(golds)]) for i in range(len(golds))]
    outcomes = [(a, g, grade(f"\\boxed{{{a}}}", g).outcome) for a, g in pairs if a != g]
    assert [row for row in outcomes if row[2] != "wrong"] == []
