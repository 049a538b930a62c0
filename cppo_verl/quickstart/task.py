"""The toy task: short signed sums, two ways of answering them, and the verl data files.

A problem reads ``3+5-2+4?``.  A *worked* answer carries the running total through every operation and is
right; a *sloppy* answer lists the operands and guesses.  A warm start on a mixture of both leaves a policy
that can work but seldom does, so what reinforcement learning adds is correctness, never format.
"""

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from cppo_verl.grading.extract import final_answer

DATA_SOURCE = "arithmetic"
BOX_OPENING = r"\boxed{"


class Problem(Protocol):
    """What warm-up, measurement and data files need of a problem, here and in tasks of other recipes."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the model's answer."""

    @property
    def answer(self) -> int:
        """The value that the answer's box has to hold."""


@dataclass(frozen=True)
class SignedSum:
    """One signed sum: ``operands[0]`` followed by ``signs[i] * operands[i + 1]``, each sign +1 or -1."""

    operands: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def operations(self) -> list[str]:
        """The text of every operation after the first operand, such as ``["+5", "-2"]``."""
        return [f"{'+' if sign > 0 else '-'}{n}" for sign, n in zip(self.signs, self.operands[1:], strict=True)]

    @property
    def question(self) -> str:
        """The user message."""
        return f"{self.operands[0]}{''.join(self.operations)}?"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question, alone."""
        return [{"role": "user", "content": self.question}]

    @property
    def running_totals(self) -> list[int]:
        """The total after each operand; the last one is the answer."""
        totals = [self.operands[0]]
        for sign, operand in zip(self.signs, self.operands[1:], strict=True):
            totals.append(totals[-1] + sign * operand)
        return totals

    @property
    def answer(self) -> int:
        """The value of the sum."""
        return self.running_totals[-1]


@dataclass(frozen=True)
class TaskSpec:
    """Which sums exist (number of terms, operands 1..operand_max), how many go to each split, is there a calculator."""

    terms: int = 4
    operand_max: int = 5
    calculator: bool = False
    warmup_problems: int = 3000
    train_problems: int = 1600
    heldout_problems: int = 64

    @property
    def total(self) -> int:
        """Number of distinct problems."""
        return self.operand_max**self.terms * 2 ** (self.terms - 1)

    def problem(self, index: int) -> SignedSum:
        """Decode ``index`` in [0, total) to its problem; distinct indices give distinct expressions."""
        operands = []
        for _ in range(self.terms):
            index, digit = divmod(index, self.operand_max)
            operands.append(digit + 1)
        signs = tuple(1 if index >> bit & 1 else -1 for bit in range(self.terms - 1))
        return SignedSum(tuple(operands), signs)

    def random_problem(self, rng: random.Random) -> SignedSum:
        """Draw one problem uniformly from the whole task."""
        return self.problem(rng.randrange(self.total))


@dataclass(frozen=True)
class Splits:
    """Three sets of problems with no expression in common."""

    warmup: list[SignedSum]
    train: list[SignedSum]
    heldout: list[SignedSum]


def make_splits(spec: TaskSpec, seed: int) -> Splits:
    """Draw the three splits without replacement, the same ones for the same spec and seed.

    Raises:
        ValueError: there are fewer problems than that, or more than can be numbered.
    """
    sizes = (spec.heldout_problems, spec.train_problems, spec.warmup_problems)
    if min(sizes) < 1 or sum(sizes) > spec.total:
        raise ValueError(f"splits of {sizes} problems do not fit the {spec.total} distinct problems of {spec}")
    if spec.total > sys.maxsize:
        raise ValueError(f"{spec} has 10^{len(str(spec.total)) - 1} problems: fewer terms, or smaller operands")
    indices = random.Random(f"splits-{seed}").sample(range(spec.total), sum(sizes))
    problems = [spec.problem(index) for index in indices]
    train_end = spec.heldout_problems + spec.train_problems
    return Splits(
        warmup=problems[train_end:],
        train=problems[spec.heldout_problems : train_end],
        heldout=problems[: spec.heldout_problems],
    )


def worked_answer(problem: SignedSum) -> str:
    """The careful style: ``3+5=8 8-2=6 6+4=10 \\boxed{10}``."""
    moves = zip(pairwise(problem.running_totals), problem.operations, strict=True)
    steps = [f"{before}{operation}={after}" for (before, after), operation in moves]
    return " ".join([*steps, f"{BOX_OPENING}{problem.answer}}}"])


def sloppy_answer(problem: SignedSum, spec: TaskSpec, rng: random.Random) -> str:
    """The careless style: ``3 5 2 4 so \\boxed{7}``, the guess being the answer to some other random problem."""
    guess = spec.random_problem(rng).answer
    return f"{' '.join(map(str, problem.operands))} so {BOX_OPENING}{guess}}}"


def is_correct(text: str, answer: int) -> bool:
    """Whether the last box of ``text`` holds the integer ``answer``."""
    boxed = final_answer(text) or ""
    return re.fullmatch(r"[+-]?[0-9]+", boxed) is not None and int(boxed) == answer


def write_parquet(problems: Sequence[Problem], split: str, path: Path, data_source: str = DATA_SOURCE) -> None:
    """Write problems as a verl RL data file, one row each."""
    rows = [
        {
            "data_source": data_source,
            "prompt": problem.messages,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
            "extra_info": {"index": index, "split": split},
        }
        for index, problem in enumerate(problems)
    ]
    import pandas as pd  # not where a finished build is only looked for

    pd.DataFrame(rows).to_parquet(path, index=False)
