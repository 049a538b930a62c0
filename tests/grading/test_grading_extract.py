"""Where the answer stands: hand cases for boxes, thinking and answer lines."""

import time

import pytest

from cppo_verl.grading.extract import final_answer

BOXES = {
    "plain": (r"so \boxed{34}.", "34"),
    "nested braces": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "last of several": (r"\boxed{35} no, \boxed{34}", "34"),
    "last one holds words": (r"\boxed{34} \boxed{\text{none}}", r"\text{none}"),
    "outer of nested boxes": (r"\boxed{x = \boxed{34}}", r"x = \boxed{34}"),
    "cut off box is not balanced": (r"\boxed{34} and \boxed{3", "34"),
    "stray brace before": (r"the set {1, 2 and \boxed{34}", "34"),
    "escaped braces do not count": (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    "space and doubled backslash": (r"\\boxed {34}", "34"),
    "no box: never any number in the text": ("the answer is 34", None),
    "answer line not asked for": ("Answer: 34", None),
    "other boxes of LaTeX": (r"\boxed{35}, that is \fbox{34}", "34"),
    "a box with a width": (r"\framebox[3cm][c]{34}", "34"),
    "a rule is no box": (r"\boxed{34} \fboxsep{3}", "34"),
    "empty box": (r"\boxed{ }", None),
    "box in the thinking only": (r"<think>\boxed{34}</think> done", None),
    "box after the last thinking": (r"\boxed{35}</think>\n\boxed{1}</think>\boxed{34}", "34"),
}


@pytest.mark.parametrize(("response", "answer"), BOXES.values(), ids=BOXES.keys())
def test_box(response, answer):
    assert final_answer(response) == answer


LINES = {
    "plain": ("bla\nAnswer: 34", "34"),
    "markdown": ("**Answer:** 34", "34"),
    "all bold": ("**Answer: 34**", "34"),
    "heading": ("### Final Answer: $34$", "$34$"),
    "next line": ("Answer:\n\n34\n", "34"),
    "display math": ("Answer:\n\\[\n34\n\\]", "34"),
    "box on the line": (r"Answer: $\boxed{34}$", "34"),
    "line after a box": ("\\boxed{35}\nAnswer: 34", "34"),
    "box after a line": ("Answer: see below\n\\boxed{34}", "34"),
    "last of several lines": ("Answer: 35\nAnswer: 34", "34"),
    "not at the start of a line": ("I think the right answer: 34", None),
    "box where no line was written": (r"\boxed{34}", "34"),
    "nothing after it": ("Answer:", None),
}


@pytest.mark.parametrize(("response", "answer"), LINES.values(), ids=LINES.keys())
def test_answer_line(response, answer):
    assert final_answer(response, answer_line=True) == answer


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "Answer:", "{", "*", "- ", "\\", "\n> ", "\nAnswer:\n", "\nAnswer ", " ", "$$"], ids=repr
)
def test_extraction_is_linear_in_the_length(piece):
    started = time.monotonic()
    final_answer(piece * 50_000, answer_line=True)
    assert time.monotonic() - started < 2.0
