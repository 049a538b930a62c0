"""The calculator that a model of the toy task may call (``--calculator``), and how a call and its result are written.

They stand as Qwen3's chat template writes them. The frame of a call is one token and that of a result two: what a
policy has to learn is when to call and with what, not JSON.
"""

import re

from cppo_verl.quickstart.task import BOX_OPENING, SignedSum

CALL_OPENING = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "'
CALL_CLOSING = '"}}\n</tool_call>'
RESULT_OPENING = "<tool_response>\n"
RESULT_CLOSING = "\n</tool_response>"
WORDS = (CALL_OPENING, CALL_CLOSING, RESULT_OPENING, RESULT_CLOSING)
MAX_CALLS = 4

_CALL = re.compile(rf"{re.escape(CALL_OPENING)}([^\"]*){re.escape(CALL_CLOSING)}$")


def evaluate(expression: str) -> int:
    """The value of whole numbers with ``+`` and ``-`` between them.

    Raises:
        ValueError: it is anything else.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,9}([+-][0-9]{1,9})*", expression, re.ASCII):
        raise ValueError(f"{expression!r} is no sum of whole numbers")
    return sum(map(int, re.findall(r"[+-]?[0-9]+", expression)))


def called_with(text: str) -> str | None:
    """The expression of the call that a turn ends in, None where it ends otherwise."""
    call = _CALL.search(text)
    return call[1] if call else None


def result_turn(result: str) -> str:
    """What stands between a call and the model's next turn, from the end of its own."""
    return f"\n<|im_start|>user\n{RESULT_OPENING}{result}{RESULT_CLOSING}<|im_end|>\n<|im_start|>assistant\n"


def calling_answer(problem: SignedSum) -> list[str]:
    """The careful style with a calculator: a call for each operation, its result, and the last one boxed.

    Turns of the model and of the calculator alternate, the model's first.
    """
    turns = []
    totals = problem.running_totals
    for before, operation, after in zip(totals[:-1], problem.operations, totals[1:], strict=True):
        turns += [f"{CALL_OPENING}{before}{operation}{CALL_CLOSING}", result_turn(str(after))]
    return [*turns, f"{BOX_OPENING}{problem.answer}}}"]
