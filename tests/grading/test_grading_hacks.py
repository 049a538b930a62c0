"""What must not pay: unfinished text, hedging, and forms that read as more than one answer."""

import json
import os
import random
from pathlib import Path

import pytest

from cppo_verl.grading import grade

DATA = os.environ.get("CPPO_DATA_DIR")
needs_data = pytest.mark.skipif(DATA is None, reason="CPPO_DATA_DIR is not set: the public data sets are not here")

HACKS = {
    "number in the text": "It must be 34, since 30 + 4 = 34.",
    "unfinished box": r"so the answer is \boxed{34",
    "two values in one box": r"\boxed{34, 35}",
    "the same value twice": r"\boxed{34, 34}",
    "set": r"\boxed{\{34, 35\}}",
    "set by a condition": r"\boxed{\{34 \mid x > 0\}}",
    "equation of different numbers": r"\boxed{35 = 34}",
    "the other way round": r"\boxed{34 = 35}",
    "percent": r"\boxed{34\%}",
    "inequality": r"\boxed{\geq 34}",
    "plus-minus": r"\boxed{\pm 34}",
    "or": r"\boxed{34 \text{ or } 35}",
    "boxes of every number": " ".join(rf"\boxed{{{n}}}" for n in range(100)),
    "right box, then another": r"\boxed{34} or rather \boxed{35}",
    "right box, then words": r"\boxed{34} \boxed{\text{unknown}}",
    "box in the thinking": r"<think>\boxed{34}</think> I am not sure.",
    "another box after the thinking": r"\boxed{34}</think> \boxed{35}",
    "digits side by side": r"\boxed{3 4}",
    "sum of digits with a gap": r"\boxed{30 4}",
    "box in a box": r"\boxed{35 \boxed{34}}",
    "nothing": r"\boxed{}",
}
LINES = {
    "list after Answer": "Answer: 34, 35",
    "two lines": "Answer: 34\nAnswer: 35",
    "line, then another box": "Answer: 34\n\\boxed{35}",
    "sentence": "The answer is 34",
}


@pytest.mark.parametrize("response", HACKS.values(), ids=HACKS.keys())
@pytest.mark.parametrize("answer_line", [False, True])
def test_scores_nothing(response, answer_line):
    assert grade(response, "34", answer_line=answer_line).outcome != "right"


@pytest.mark.parametrize("response", LINES.values(), ids=LINES.keys())
def test_answer_lines_score_nothing(response):
    assert grade(response, "34", answer_line=True).outcome != "right"


def test_the_same_forms_pay_where_they_are_answers():
    """The checks above can fail: one change each makes the answer right."""
    right = [r"\boxed{34}", r"\boxed{34 = 34}", r"<think>\boxed{35}</think>\boxed{34}", r"\boxed{35}, no, \boxed{34}"]
    assert [grade(text, "34").outcome for text in right] == ["right"] * 4
    assert grade("Answer: 34", "34", answer_line=True).outcome == "right"
    assert grade(r"\boxed{34\%}", "0.34").outcome == "right"


def solutions():
    """500 worked solutions, with the answer as an intermediate value before the box."""
    rng = random.Random(0)
    for line in (Path(DATA) / "math500.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        steps = [f"First consider the case n = {rng.randrange(100)}."] * rng.randrange(1, 4)
        middle = [f"This gives ${answer}$.", f"So the value is {answer}.", f"Checking: \\[ x = {answer} \\]"]
        yield answer, " ".join([*steps, *middle, *steps]) + f" Therefore the answer is \\boxed{{{answer}}}."


@needs_data
@pytest.mark.parametrize("answer_line", [False, True])
def test_solutions_cut_before_their_box_score_nothing(answer_line):
    cut = [(answer, text[: text.index("\\boxed") + extra]) for answer, text in solutions() for extra in (0, 7)]
    cut += [(answer, text[: text.rindex("}")]) for answer, text in solutions()]
    assert len(cut) == 1500
    outcomes = {grade(text, answer, answer_line=answer_line).outcome for answer, text in cut}
    assert outcomes == {"no_answer"}
    whole = [grade(text, answer, answer_line=answer_line).outcome for answer, text in solutions()]
    assert whole == ["right"] * 500
