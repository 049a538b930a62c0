"""Statistics against brute force, closed forms and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from cppo_verl.evaluation.statistics import (
    avg_at_k,
    decoding_error,
    paired_difference,
    pass_at_k,
    question_interval,
)


def _runs(seed, questions=90, samples=16, shift=0.0):
    """(chance of a right answer per question, drawn samples): AIME-like, most questions easy or hopeless."""
    rng = np.random.default_rng(seed)
    chance = np.clip(rng.beta(0.5, 1.2, questions) + shift, 0, 1)
    return chance, rng.random((questions, samples)) < chance[:, None]


def test_avg_at_k_by_hand():
    assert avg_at_k([[True, False], [True, True], [False, False]]) == 0.5


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(k):
    correct = np.array([[1, 0, 0, 1, 0, 0], [0] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]], dtype=bool)
    subsets = list(itertools.combinations(range(6), k))
    brute = np.mean([np.mean([row[list(subset)].any() for subset in subsets]) for row in correct])
    assert pass_at_k(correct, k) == pytest.approx(brute)


def test_decoding_error_squared_is_unbiased_for_the_variance_over_decodings():
    chance, _ = _runs(0, questions=30)
    rng = np.random.default_rng(1)
    draws = [rng.random((30, 4)) < chance[:, None] for _ in range(4000)]
    truth = (chance * (1 - chance) / 4).sum() / 30**2
    assert np.mean([decoding_error(d) ** 2 for d in draws]) == pytest.approx(truth, rel=0.03)
    assert np.var([avg_at_k(d) for d in draws]) == pytest.approx(truth, rel=0.1)


def test_question_interval_is_the_t_interval_of_the_question_means():
    _, correct = _runs(2)
    reference = stats.ttest_1samp(correct.mean(axis=1), 0.0).confidence_interval(0.9)
    assert question_interval(correct, level=0.9) == pytest.approx((reference.low, reference.high))


def test_question_interval_covers_the_mean_over_all_questions():
    rng = np.random.default_rng(3)
    truth, covered = 0.5 / 1.7, 0
    for _ in range(1000):
        chance = rng.beta(0.5, 1.2, 90)
        low, high = question_interval(rng.random((90, 8)) < chance[:, None])
        covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_question_interval_stays_within_the_possible_scores():
    low, high = question_interval([[True, True], [True, True], [True, False]])
    assert high == 1.0
    assert low < 5 / 6


def test_paired_p_value_is_exact_on_few_questions():
    _, a = _runs(4, questions=8)
    _, b = _runs(5, questions=8)
    differences = a.mean(axis=1) - b.mean(axis=1)
    flipped = np.array([(differences * signs).mean() for signs in itertools.product((1, -1), repeat=8)])
    brute = (np.abs(flipped) >= abs(differences.mean()) - 1e-12).mean()
    difference, low, high, p_value = paired_difference(a, b)
    assert difference == pytest.approx(avg_at_k(a) - avg_at_k(b))
    assert p_value == pytest.approx(brute)
    reference = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1)).confidence_interval(0.95)
    assert (low, high) == pytest.approx((reference.low, reference.high))


def test_pairing_finds_a_gain_that_separate_intervals_hide():
    chance, a = _runs(6, samples=64)
    b = np.random.default_rng(7).random((90, 64)) < np.clip(chance - 0.04, 0, 1)[:, None]
    assert question_interval(a)[0] < question_interval(b)[1]
    difference, low, _, p_value = paired_difference(a, b)
    assert low > 0
    assert p_value < 0.001
    assert paired_difference(a, b) == paired_difference(a, b)
    backward = paired_difference(b, a)
    assert backward[0] == -difference
    assert backward[2] == pytest.approx(-low)


def test_two_runs_without_any_difference():
    _, a = _runs(8)
    assert paired_difference(a, a) == (0.0, 0.0, 0.0, 1.0)


def test_runs_may_differ_in_their_number_of_samples():
    _, a = _runs(9, samples=16)
    assert paired_difference(a, a[:, :8])[0] == pytest.approx(avg_at_k(a) - avg_at_k(a[:, :8]))


ROW = [[True, False]]
BAD = {
    "one dimension": (lambda: avg_at_k([True, False]), "correct"),
    "empty": (lambda: avg_at_k(np.zeros((0, 4))), "correct"),
    "not 0 or 1": (lambda: avg_at_k([[0.5, 1.0]]), "correct"),
    "nan": (lambda: avg_at_k([[float("nan"), 1.0]]), "correct"),
    "k too large": (lambda: pass_at_k(ROW, 3), "k must"),
    "k zero": (lambda: pass_at_k(ROW, 0), "k must"),
    "one sample": (lambda: decoding_error([[True], [False]]), "two samples"),
    "one question": (lambda: question_interval(ROW), "two questions"),
    "level": (lambda: question_interval(ROW * 2, level=95), "level"),
    "different questions": (lambda: paired_difference(ROW * 2, ROW * 3), "same questions"),
    "bad b": (lambda: paired_difference(ROW * 2, [True, False]), "b must"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_the_name_of_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
