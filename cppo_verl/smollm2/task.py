"""Worded sums of one or two steps, in SmolLM2's conversation.

``Mia has 13 pens, buys 5 and loses 12. How many pens does Mia have?`` is answered as the quickstart's sums are, with
the running total through every step: ``13+5=18 18-12=6 \\boxed{6}``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cppo_verl.quickstart.task import SignedSum, worked_answer

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
        told = ", ".join([f"{self.name} has {self.sum.operands[0]} {self.thing}", *events[:-1]])
        return f"{told} and {events[-1]}. How many {self.thing} does {self.name} have?"

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

    operand_max: int = 20
    two_step_share: float = 0.5
    warmup_problems: int = 300
    train_problems: int = 400
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
    # Additions alone are operand_max**2 sums of one step, and operand_max times as many of two.
    scarce = sum(sizes) * max(1 - spec.two_step_share, spec.two_step_share / spec.operand_max)
    if scarce > spec.operand_max**2:
        raise ValueError(f"{sum(sizes)} problems are more than there are for numbers up to {spec.operand_max}")
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


def worked(problem: WordedSum, _: random.Random) -> Sequence[str]:
    """The answer that the warm start shows: the quickstart's careful one, in a turn of its own."""
    return [worked_answer(problem.sum)]
