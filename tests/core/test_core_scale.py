"""Long responses and large batches: prefix sums in float32, and a quantile beyond torch.quantile's limit."""

import core_reference as slow
import pytest
import torch
from core_cases import generator

from cppo_verl.core.masks import cppo_mask, soft_gate, trm_mask
from cppo_verl.core.weights import position_weights, prefix_budget

T = 16384


def long_rows(dtype=torch.float32, rows=3):
    """S follows its budget closely, as a random walk that crosses it many times."""
    g = generator(0)
    mask = torch.ones(rows, T, dtype=torch.bool)
    mask[1:] = torch.rand(rows - 1, T, generator=g) < 0.9
    divergence = (0.03 * torch.rand(rows, T, generator=g)).to(dtype)
    divergence[torch.rand(rows, T, generator=g) < 0.01] = 0.2
    weights = position_weights(mask, 0.8)
    spent = (weights * divergence.float()).double().sum(1) / weights.double().sum(1)
    return mask, divergence, weights, spent.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decisions_at_16384_tokens_differ_from_float64_only_next_to_a_threshold(dtype):
    mask, divergence, weights, budget = long_rows(dtype)
    ones = torch.ones_like(weights)
    options = {"delta": 0.15, "weights": weights, "delta_b": budget}
    region = cppo_mask(ones, ones, divergence, mask, **options)
    gate = soft_gate(ones, ones, divergence, mask, **options)
    for row in range(mask.shape[0]):
        inputs = [x[row].double().tolist() for x in (ones, ones, divergence)] + [mask[row].tolist()]
        kw = {"delta": 0.15, "weights": weights[row].double().tolist(), "delta_b": budget[row].item()}
        expected = slow.cppo_mask(*inputs, **kw)
        clear = torch.tensor([d.margin > 1e-4 for d in expected])
        keep = torch.tensor([d.keep for d in expected])
        assert torch.equal(region.keep[row][clear], keep[clear])
        assert clear.float().mean() > 0.95
        assert 500 < keep.sum() < mask[row].sum() - 500
        threshold = torch.tensor([d.threshold for d in expected])
        torch.testing.assert_close(region.threshold[row], threshold, atol=1e-4, rtol=0)
        want = torch.tensor([g for g, _ in slow.soft_gate(*inputs, **kw)])
        torch.testing.assert_close(gate[row], want, atol=2e-5, rtol=2e-5)


def test_the_mean_of_trm_is_accurate_at_16384_tokens():
    """Means 1e-6 below and above the limit are told apart, in bfloat16 inputs too."""
    mask, divergence, _, _ = long_rows(torch.bfloat16, rows=2)
    for row in range(2):
        mean = divergence[row][mask[row]].double().mean().item()
        for shift, kept in [(1e-6, True), (-1e-6, False)]:
            region = trm_mask(divergence[row : row + 1], mask[row : row + 1], delta_avg=mean + shift)
            assert region.keep.any().item() is kept


def test_the_budget_of_more_than_16_million_elements():
    """torch.quantile refuses such an input."""
    rows = 1040
    divergence = torch.rand(rows, T, generator=generator(1))
    mask = (torch.arange(T) < torch.linspace(1, T, rows).long()[:, None]).contiguous()
    assert divergence.numel() > 16_000_000
    divergence[~mask] = float("nan")
    budget = prefix_budget(divergence, mask, delta_b=0.01, quantile=0.9, max_factor=1e4)
    for row in (0, 1, 7, 500, rows - 1):
        own = divergence[row][mask[row]].double().tolist()
        assert budget[row].item() == pytest.approx(slow.linear_quantile(own, 0.9), rel=1e-5)
