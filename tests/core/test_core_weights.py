"""Position weights (Eq. 9) and the prefix budget (Eq. 22) against slow references and by hand."""

import core_reference as slow
import pytest
import torch
from core_cases import FLOAT_DTYPES, MASK_DTYPES, generator, ragged_mask, rows_of, spoil

from cppo_verl.core.weights import position_weights, prefix_budget

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 300])
@pytest.mark.parametrize("seed", range(4))
def test_linear_weights_match_the_slow_loop(seed, length, mask_dtype):
    mask = ragged_mask(generator(seed), 7, length)
    for w_min in (1e-3, 0.6, 0.8, 1.0):
        weights = position_weights(mask.to(mask_dtype), w_min)
        expected = torch.tensor([slow.position_weights(row, w_min) for row in mask.tolist()])
        assert weights.dtype == torch.float32
        assert weights.shape == mask.shape
        torch.testing.assert_close(weights, expected, atol=3e-7, rtol=0)
        assert weights[~mask].eq(0).all()


LINEAR_CASES = {
    "first is one, last is w_min": ([1, 1, 1, 1, 1], 0.5, [1, 0.875, 0.75, 0.625, 0.5]),
    "T is the row's own length, not the padded width": ([1, 1, 1, 0, 0], 0.5, [1, 0.75, 0.5, 0, 0]),
    "T = 1 gives one": ([1, 0, 0], 0.5, [1, 0, 0]),
    "T = 1 behind a hole gives one": ([0, 0, 1], 0.5, [0, 0, 1]),
    "positions count valid tokens only": ([1, 0, 1, 0, 1], 0.5, [1, 0, 0.75, 0, 0.5]),
    "T = 2": ([1, 1], 0.25, [1, 0.25]),
    "no valid token": ([0, 0, 0], 0.5, [0, 0, 0]),
    "w_min = 1 is no weighting": ([1, 1, 1, 0], 1.0, [1, 1, 1, 0]),
}


@pytest.mark.parametrize(("mask", "w_min", "expected"), LINEAR_CASES.values(), ids=LINEAR_CASES.keys())
def test_linear_weights_by_hand(mask, w_min, expected):
    weights = position_weights(torch.tensor([mask]), w_min)
    torch.testing.assert_close(weights, torch.tensor([expected], dtype=torch.float32), atol=1e-7, rtol=0)


HORIZON_CASES = {
    "the slope is the horizon's": ([1, 1, 1, 0], 5, [1, 0.875, 0.75, 0]),
    "a response as long as the horizon": ([1, 1, 1, 1, 1], 5, [1, 0.875, 0.75, 0.625, 0.5]),
    "beyond the horizon w_min stays": ([1, 1, 1, 1], 3, [1, 0.75, 0.5, 0.5]),
    "a horizon of one": ([1, 1], 1, [1, 1]),
}


@pytest.mark.parametrize(("mask", "horizon", "expected"), HORIZON_CASES.values(), ids=HORIZON_CASES.keys())
def test_a_common_horizon_by_hand(mask, horizon, expected):
    weights = position_weights(torch.tensor([mask]), 0.5, horizon=horizon)
    torch.testing.assert_close(weights, torch.tensor([expected], dtype=torch.float32), atol=1e-7, rtol=0)


def test_shuffling_permutes_the_weights_that_the_horizon_gives():
    mask = ragged_mask(generator(2), 4, 9)
    ordered = position_weights(mask, 0.6, horizon=20)
    shuffled = position_weights(mask, 0.6, horizon=20, schedule="shuffled", generator=generator(5))
    assert torch.equal(ordered.sort(-1).values, shuffled.sort(-1).values)
    assert not torch.equal(ordered, shuffled)


def test_a_horizon_below_one_is_refused():
    with pytest.raises(ValueError, match="horizon must be 1 or more, or None, got 0"):
        position_weights(torch.ones(1, 2), 0.5, horizon=0)


def test_linear_is_the_default_schedule():
    mask = ragged_mask(generator(1), 5, 12)
    assert torch.equal(position_weights(mask, 0.7), position_weights(mask, 0.7, schedule="linear"))


def test_the_last_weight_is_w_min_on_a_long_response():
    weights = position_weights(torch.ones(1, 16384), 0.8)
    assert weights[0, 0] == 1
    assert abs(weights[0, -1].item() - 0.8) < 1e-6
    assert (weights.diff() <= 0).all()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_uniform_weights_are_the_mask(mask_dtype):
    mask = ragged_mask(generator(3), 6, 15)
    weights = position_weights(mask.to(mask_dtype), 0.6, schedule="uniform")
    assert weights.dtype == torch.float32
    assert torch.equal(weights, mask.float())


@pytest.mark.parametrize("seed", range(8))
def test_shuffled_weights_permute_each_row_within_itself(seed):
    mask = ragged_mask(generator(seed), 6, 40)
    linear = position_weights(mask, 0.5)
    shuffled = position_weights(mask, 0.5, schedule="shuffled", generator=generator(seed))
    assert shuffled.dtype == torch.float32
    assert shuffled[~mask].eq(0).all()
    for row in range(6):
        own = mask[row]
        assert torch.equal(shuffled[row, own].sort().values, linear[row, own].sort().values)
    assert not torch.equal(shuffled, linear)


def test_shuffled_weights_are_reproducible_from_the_generator():
    mask = ragged_mask(generator(0), 6, 40)
    first, again, other = (
        position_weights(mask, 0.5, schedule="shuffled", generator=generator(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shuffled_weights_do_not_touch_the_global_generator_when_given_one():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    position_weights(torch.ones(3, 9), 0.5, schedule="shuffled", generator=generator(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_shuffled_rows_are_permuted_independently_and_uniformly():
    """Each weight lands on each valid position equally often: 4 positions, 8000 rows, 5 sigma."""
    mask = torch.tensor([1, 0, 1, 1, 1, 0]).expand(8000, 6)
    weights = position_weights(mask, 0.25, schedule="shuffled", generator=generator(2))
    valid = weights[:, [0, 2, 3, 4]]
    for value in (1.0, 0.75, 0.5, 0.25):
        share = torch.isclose(valid, torch.tensor(value)).float().mean(0)
        assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 8000) ** 0.5
    assert len({tuple(row) for row in valid.tolist()}) == 24, "every one of the 4! orders occurs"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 11, 12, 97])
def test_quantile_budget_matches_the_slow_loop(length, mask_dtype, dtype):
    for seed in range(6):
        g = generator(seed)
        mask = ragged_mask(g, 8, length)
        scale = torch.logspace(-2, 0, 8)[:, None]
        divergence = spoil((torch.rand(8, length, generator=g) * scale).to(dtype), mask, seed)
        for delta_b, quantile, factor in [(0.02, 0.9, 2.0), (0.1, 0.9, 5.0), (0.05, 0.5, 2.0), (0.001, 1.0, 1e3)]:
            budget = prefix_budget(
                divergence, mask.to(mask_dtype), delta_b=delta_b, quantile=quantile, max_factor=factor
            )
            expected = [slow.prefix_budget(d, m, delta_b, quantile, factor) for d, m in rows_of(divergence, mask)]
            assert budget.dtype == torch.float32
            assert budget.shape == (8,)
            torch.testing.assert_close(budget, torch.tensor(expected), atol=1e-7, rtol=2e-6)


TENTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
BUDGET_CASES = {
    "eleven values: the tenth": (TENTHS, None, 0.6, 2.0, 1.0),
    "order does not matter": (TENTHS[::-1], None, 0.6, 2.0, 1.0),
    "two values interpolate linearly": ([0.0, 1.0], None, 0.5, 2.0, 0.9),
    "clamped from below": ([0.0, 0.1], None, 0.5, 2.0, 0.5),
    "clamped from above at twice": ([0.0, 10.0], None, 0.5, 2.0, 1.0),
    "clamped from above at five times": ([0.0, 10.0], None, 0.5, 5.0, 2.5),
    "one value": ([0.75], None, 0.5, 2.0, 0.75),
    "padding is no part of the quantile": ([0.0, 1.0, 0.0, 0.0], [1, 1, 0, 0], 0.5, 2.0, 0.9),
    "holes are no part of the quantile": ([NAN, 0.0, INF, 1.0], [0, 1, 0, 1], 0.5, 2.0, 0.9),
    "all equal": ([0.7] * 6, None, 0.5, 2.0, 0.7),
    "no valid token gives delta_b": ([NAN, 0.7], [0, 0], 0.5, 2.0, 0.5),
    "an infinite divergence is clamped from above": ([0.1, 0.1, 0.1, 0.1, INF], None, 0.5, 2.0, 1.0),
    "infinite divergences only": ([INF, INF], None, 0.5, 2.0, 1.0),
    "delta_b = 0 leaves no budget": ([0.7, 0.1], None, 0.0, 2.0, 0.0),
}


@pytest.mark.parametrize(
    ("values", "mask", "delta_b", "factor", "expected"), BUDGET_CASES.values(), ids=BUDGET_CASES.keys()
)
def test_quantile_budget_by_hand(values, mask, delta_b, factor, expected):
    mask = torch.tensor([mask or [1] * len(values)])
    budget = prefix_budget(torch.tensor([values]), mask, delta_b=delta_b, quantile=0.9, max_factor=factor)
    assert budget.tolist() == pytest.approx([expected], abs=1e-6)


def test_the_default_ceiling_is_twice_the_floor():
    budget = prefix_budget(torch.full((1, 4), 9.0), torch.ones(1, 4), delta_b=0.02, quantile=0.9)
    assert budget.tolist() == pytest.approx([0.04])


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_a_fixed_budget_ignores_the_divergence(mask_dtype):
    mask = ragged_mask(generator(0), 5, 9)
    divergence = spoil(torch.rand(5, 9), mask)
    budget = prefix_budget(divergence, mask.to(mask_dtype), delta_b=0.015)
    assert budget.dtype == torch.float32
    assert torch.equal(budget, torch.full((5,), 0.015))


def test_the_quantile_ignores_order():
    """A decreasing D and an increasing D share one budget."""
    divergence = torch.linspace(0.02, 0.04, 50)[None]
    one = prefix_budget(divergence, torch.ones(1, 50), delta_b=0.02, quantile=0.9)
    two = prefix_budget(divergence.flip(1), torch.ones(1, 50), delta_b=0.02, quantile=0.9)
    assert torch.equal(one, two)
    assert one.item() == pytest.approx(0.038, abs=1e-6)
