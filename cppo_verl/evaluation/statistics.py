"""Statistics of repeated sampling: `correct` is a bool array [questions, samples], one row per question.

Two errors answer two different questions and must not be mixed. `decoding_error`: how far would the score move if the
same model answered the same questions again? `question_interval`: how far, if other questions of the same kind had
been asked? The second is several times the first on AIME-sized sets.

The functions that start with ``mean_`` take one array per benchmark and speak of the unweighted mean of the benchmarks;
questions are then drawn anew within each benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

_SIGN_FLIPS = 9999  # all 2^Q sign patterns are used where there are no more than these (Q <= 13)


def avg_at_k(correct: ArrayLike) -> float:
    """Mean over questions and samples: Avg@k, a fraction in [0, 1]."""
    return float(_samples("correct", correct).mean())


def pass_at_k(correct: ArrayLike, k: int) -> float:
    """Unbiased pass@k, mean over questions of 1 - C(n-c, k) / C(n, k), with c right answers among n samples.

    Raises:
        ValueError: k is not between 1 and the number of samples.
    """
    samples = _samples("correct", correct)
    n = samples.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} samples per question, got {k}")
    # The chance that k of the n samples, drawn without putting back, hold none of the right ones.
    none_right = stats.hypergeom.pmf(0, n, samples.sum(axis=1), k)
    return float(1.0 - none_right.mean())


def decoding_error(correct: ArrayLike) -> float:
    """Standard error of Avg@k with the questions fixed: only the randomness of decoding, a fraction.

    Raises:
        ValueError: fewer than two samples per question, which say nothing about the spread between samples.
    """
    samples = _samples("correct", correct)
    questions, n = samples.shape
    if n < 2:
        raise ValueError("correct needs at least two samples per question for a decoding error")
    return float(math.sqrt((samples.var(axis=1, ddof=1) / n).sum()) / questions)


def question_interval(correct: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the confidence interval for Avg@k with questions as the sampling unit, clipped to [0, 1].

    A t-interval over the per-question means: samples of one question are not independent draws, so the question is the
    unit. Preferred to a percentile bootstrap, which on 30 questions is too narrow by (1 - 1/Q)^0.5 and ignores the t
    quantile, and which needs a seed. Where every question has the same mean, the interval has width 0 and says nothing.

    Raises:
        ValueError: fewer than two questions, or `level` outside (0, 1).
    """
    low, high = _stratified_interval([_samples("correct", correct).mean(axis=1)], level)
    return max(0.0, low), min(1.0, high)


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: ArrayLike) -> float:
    """Share of questions whose most frequent answer is right, a fraction; k is the number of samples.

    Args:
        answers: per question one answer per sample, in one spelling; None does not vote.
        correct: bool array [questions, samples].

    Of equally frequent answers each counts for its part, so that the order of the samples does not matter. A question
    without any answer is wrong.
    """
    samples = _samples("correct", correct)
    shares = []
    for row, verdicts in zip(answers, samples, strict=True):
        votes: dict[str, list[float]] = {}
        for answer, verdict in zip(row, verdicts, strict=True):
            if answer is not None:
                votes.setdefault(answer, []).append(verdict)
        most = max(map(len, votes.values()), default=0)
        winners = [np.mean(verdict) for verdict in votes.values() if len(verdict) == most]
        shares.append(np.mean(winners) if winners else 0.0)
    return float(np.mean(shares))


def mean_decoding_error(benchmarks: Sequence[ArrayLike]) -> float:
    """`decoding_error` of the mean of several benchmarks' Avg@k."""
    return math.hypot(*(decoding_error(correct) for correct in benchmarks)) / len(benchmarks)


def mean_question_interval(benchmarks: Sequence[ArrayLike], level: float = 0.95) -> tuple[float, float]:
    """`question_interval` of the mean of several benchmarks' Avg@k (Welch-Satterthwaite degrees of freedom)."""
    means = [_samples("correct", correct).mean(axis=1) for correct in benchmarks]
    low, high = _stratified_interval(means, level)
    return max(0.0, low), min(1.0, high)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> tuple[float, float, float, float]:
    """(difference, low, high, p_value) of Avg@k of run `a` minus run `b` on the same questions, in the same order.

    The interval is a t-interval over the per-question differences. The p-value is two-sided, from flipping the signs
    of those differences (under "no difference" the two runs of a question can be swapped): exact up to 13 questions,
    9,999 fixed random patterns above, so that it is the same at every call and never below 0.0002.

    Raises:
        ValueError: different questions counts, fewer than two questions, or `level` outside (0, 1).
    """
    return mean_paired_difference([a], [b], level)


def mean_paired_difference(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], level: float = 0.95
) -> tuple[float, float, float, float]:
    """`paired_difference` of the mean of several benchmarks' Avg@k; a[i] and b[i] are the same benchmark."""
    differences = [_differences(first, second) for first, second in zip(a, b, strict=True)]
    low, high = _stratified_interval(differences, level)
    questions = sum(map(len, differences))
    # Weighted so that their plain mean is the unweighted mean over the benchmarks.
    weighted = np.concatenate([values * questions / (len(values) * len(differences)) for values in differences])
    test = stats.permutation_test(
        (weighted,), np.mean, permutation_type="samples", n_resamples=_SIGN_FLIPS, vectorized=True, rng=0
    )
    return float(weighted.mean()), low, high, float(test.pvalue)


def _differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    rows_a, rows_b = _samples("a", a), _samples("b", b)
    if len(rows_a) != len(rows_b):
        raise ValueError(f"a and b must hold the same questions, got {len(rows_a)} and {len(rows_b)}")
    return rows_a.mean(axis=1) - rows_b.mean(axis=1)


def _stratified_interval(groups: Sequence[NDArray[np.float64]], level: float) -> tuple[float, float]:
    """A t-interval for the mean of the groups' means."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if min(map(len, groups)) < 2:
        raise ValueError("at least two questions are needed for an interval over questions")
    variances = np.array([stats.sem(values) ** 2 for values in groups])
    freedom = np.array([len(values) - 1 for values in groups])
    total = variances.sum()
    center = float(np.mean([values.mean() for values in groups]))
    if total == 0.0:
        return center, center
    degrees = total**2 / (variances**2 / freedom).sum()
    half = float(stats.t.ppf((1.0 + level) / 2.0, degrees) * math.sqrt(total)) / len(groups)
    return center - half, center + half


def _samples(name: str, correct: ArrayLike) -> NDArray[np.float64]:
    """The array as floats, checked to be 0/1 of shape [questions, samples]."""
    samples = np.asarray(correct, dtype=np.float64)
    if samples.ndim != 2 or samples.size == 0:
        raise ValueError(f"{name} must have shape [questions, samples] with at least one each, got {samples.shape}")
    if not np.isin(samples, (0.0, 1.0)).all():
        raise ValueError(f"{name} must hold only True and False")
    return samples
