"""Grading of mathematical answers, the same for training, validation and evaluation.

Reading order: `extract` (where the answer stands), `normalize` (how it is spelled), `exact` (plain numbers, in Python),
`pool` and `worker` (a process that may be killed), `judge` (math-verify, in the worker only), `grader`, `reward`.
"""

from cppo_verl.grading.grader import OUTCOMES, Grade, Outcome, grade
from cppo_verl.grading.reward import compute_score

__all__ = ["OUTCOMES", "Grade", "Outcome", "compute_score", "grade"]
