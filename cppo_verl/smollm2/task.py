"""Worded sums of one or two steps, in SmolLM2's conversation, and two ways of answering them.

``Mia has 23 pens, buys 45 and loses 12. How many pens does Mia have?``  A worked answer is the quickstart's, the
running total through every step; a hasty answer is a box with a number near the right one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cppo_verl.quickstart.task import BOX_OPENING, SignedSum, worked_answer
from cppo_verl.quickstart.warmup import Answering

DATA_SOURCE = "worded_sums"
# In place of the template's own system message, which is longer: every token of a prompt is paid for in every update.
SYSTEM = "Answer in \\boxed{}."
NAMES = ("Mia", "Tom", "Sara", "Ben", "Anna", "Leo", "Lucy", "Max", "Emma", "Jack", "Rose", "Sam")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs", "stones", "shells", "balls", "stamps")
GAINS = ("buys", "finds", "gets", "collects", "wins")
LOSSES = ("loses", "sells", "gives away", "breaks", "drops")


@dataclass(frozen=True)
class WordedSum:
    """A sum told as what happens to somebody's things; no running total is negative."""

    sum: SignedSum
    name: str
    thing: str
    verbs: tuple[str, ...]

    @property
    def question(self) -> str:
        """The user message."""
        events = [f"{verb} {n}" for verb, n in zip(self.verbs, self.sum.operands[1:], strict=True)]
        told = " and ".join(events) if len(events) < 3 else f"{', '.join(events[:-1])} and {events[-1]}"
        return f"{self.name} has {self.sum.operands[0]} {self.thing}, {told}. How many {self.thing} are left?"

    @property
    def messages(self) -> list[dict[str, str]]:
        """System and user message."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.question}]

    @property
    def answer(self) -> int:
        """How many things there are at the end."""
        return self.sum.answer


@dataclass(frozen=True)
class TaskSpec:
    """Which sums there are (operands 1..operand_max, share of sums of two steps), how many go to each split."""

    operand_max: int = 49
    two_step_share: float = 0.5
    warmup_problems: int = 1500
    train_problems: int = 1600
    heldout_problems: int = 64


@dataclass(frozen=True)
class Splits:
    """Three sets of problems with no sum in common, whatever the words."""

    warmup: list[WordedSum]
    train: list[WordedSum]
    heldout: list[WordedSum]


def draw(spec: TaskSpec, rng: random.Random) -> WordedSum:
    """One problem of the whole task."""
    steps = 1 + (rng.random() < spec.two_step_share)
    while True:
        operands = tuple(rng.randint(1, spec.operand_max) for _ in range(1 + steps))
        signed = SignedSum(operands, tuple(rng.choice((1, -1)) for _ in range(steps)))
        if min(signed.running_totals) >= 0:
            break
    verbs = tuple(rng.choice(GAINS if sign > 0 else LOSSES) for sign in signed.signs)
    return WordedSum(signed, rng.choice(NAMES), rng.choice(THINGS), verbs)


def make_splits(spec: TaskSpec, seed: int) -> Splits:
    """Draw the three splits, the same ones for the same spec and seed.

    Raises:
        ValueError: there may not be so many different sums.
    """
    sizes = (spec.heldout_problems, spec.train_problems, spec.warmup_problems)
    # Additions of two numbers alone are operand_max**2 sums: that many are found without long search.
    if sum(sizes) > (most := spec.operand_max**2):
        raise ValueError(f"{sum(sizes)} problems, but numbers up to {spec.operand_max} are enough for {most} only")
    rng = random.Random(f"worded-{seed}")
    found: dict[SignedSum, WordedSum] = {}
    while len(found) < sum(sizes):
        problem = draw(spec, rng)
        found.setdefault(problem.sum, problem)
    problems = list(found.values())
    train_end = spec.heldout_problems + spec.train_problems
    return Splits(
        warmup=problems[train_end:],
        train=problems[spec.heldout_problems : train_end],
        heldout=problems[: spec.heldout_problems],
    )


def hasty_answer(problem: WordedSum, rng: random.Random) -> str:
    """A box with a guess within ten of the right number, never below zero."""
    return f"{BOX_OPENING}{max(0, problem.answer + rng.randint(-10, 10))}}}"


def answering(worked_share: float) -> Answering[WordedSum]:
    """Worked answers in the given share of all cases, hasty ones otherwise."""

    def answer(problem: WordedSum, rng: random.Random) -> Sequence[str]:
        return [worked_answer(problem.sum) if rng.random() < worked_share else hasty_answer(problem, rng)]

    return answer
