"""The realised bounds against a loop over each response."""

import pytest
import torch

from cppo_verl.core import position_weights, realised_bounds


def slow(divergence, weights, mask):
    """(uniform, cppo) of one response, from the definitions."""
    d = [float(value) for value, used in zip(divergence, mask, strict=True) if used]
    w = [float(value) for value, used in zip(weights, mask, strict=True) if used]
    length = len(d)
    if length < 2:
        return 0.0, 0.0
    rates = [sum(a * b for a, b in zip(w[:m], d[:m], strict=True)) / sum(w[:m]) for m in range(1, length)]
    factor = 2 * length * (length - 1)
    return factor * max(d) ** 2, factor * max(d) * max(rates)


@pytest.mark.parametrize("seed", range(20))
def test_as_the_loop(seed):
    draw = torch.Generator().manual_seed(seed)
    divergence = torch.rand(7, 12, generator=draw) ** 4
    mask = torch.rand(7, 12, generator=draw) < 0.7  # with holes
    mask[0], mask[1, 1:] = False, False
    weights = position_weights(mask, 0.3)
    spoilt = divergence.masked_fill(~mask, torch.nan)
    found = realised_bounds(spoilt, weights, mask)
    expected = [slow(*row) for row in zip(divergence, weights, mask, strict=True)]
    torch.testing.assert_close(found.uniform, torch.tensor([row[0] for row in expected], dtype=torch.float64))
    torch.testing.assert_close(found.cppo, torch.tensor([row[1] for row in expected], dtype=torch.float64))
    assert (found.cppo <= found.uniform).all()
    assert (found.cppo < found.uniform).any()


def test_by_hand():
    """Weights 1, 1/2, 1/4; the last token's divergence is in max D and not in a prefix."""
    found = realised_bounds(
        torch.tensor([[0.2, 0.1, 0.4, 9.0]]), torch.tensor([[1.0, 0.5, 0.25, 0.0]]), torch.tensor([[1, 1, 1, 0]])
    )
    assert found.uniform.item() == pytest.approx(12 * 0.16)
    assert found.cppo.item() == pytest.approx(12 * 0.4 * 0.2)


def test_no_tokens_and_other_shapes():
    empty = torch.zeros(2, 0)
    assert realised_bounds(empty, empty, empty).cppo.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="weights has shape"):
        realised_bounds(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3))
