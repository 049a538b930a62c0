"""One case by hand per rule of the masks. All numbers are dyadic: no rounding, comparisons are exact."""

import pytest
import torch

from cppo_verl.core.masks import cppo_mask, dppo_mask, soft_gate, trm_mask

NAN, INF = float("nan"), float("inf")
QUARTER, SIXTEENTH = 0.25, 0.0625
T, F = True, False


def case(
    divergence, keep, token, prefix, threshold, *, weights=None, delta_b=SIXTEENTH, away=1.0, ratio=0.5, mask=None
):
    """delta = 1/4 throughout; away is the advantage (one number or one per token), ratio the log-ratio likewise."""
    n = len(divergence)
    each = lambda value: list(value) if isinstance(value, list) else [value] * n  # noqa: E731
    inputs = [each(ratio), each(away), divergence, mask or [1] * n]
    return inputs, weights or [1.0] * n, delta_b, (keep, token, prefix, each(threshold))


CPPO = {
    "at delta: inclusive": case([0.25], [T], [F], [F], 0.25),
    "just above delta: both causes at the first token": case([0.25 + 2**-20], [F], [T], [T], 0.25),
    "token cause alone: budget saved before": case(
        [0, 0, 0, 0, 0.3125], [T, T, T, T, F], [F, F, F, F, T], [F] * 5, 0.25
    ),
    "prefix cause alone": case([0.25, 0.1875], [T, F], [F, F], [F, T], [0.25, 0.0625]),
    "at the prefix budget: inclusive": case([0.25, 0.0625], [T, T], [F, F], [F, F], [0.25, 0.0625]),
    "both causes": case([0.25, 0.5], [T, F], [F, T], [F, T], [0.25, 0.0625]),
    "masked tokens accumulate in S": case([0.5, 0.125], [F, F], [T, F], [T, T], [0.25, -0.1875]),
    "corrective tokens accumulate in S": case([0.5, 0.125], [T, F], [T, F], [T, T], [0.25, -0.1875], away=[-1.0, 1.0]),
    "masked tokens accumulate in W": case(
        [0.5, 0, 0.25], [F, T, T], [T, F, F], [T, F, F], [0.25, 0.0, 0.25], delta_b=0.25
    ),
    "threshold below zero: even D = 0 is refused": case(
        [1, 0, 0], [F, F, F], [T, F, F], [T, T, T], [0.25, -0.6875, -0.625]
    ),
    "threshold below zero: corrective tokens are kept": case(
        [1, 1, 0], [F, T, F], [T, T, F], [T, T, T], [0.25, -0.6875, -1.625], away=[1.0, -1.0, 1.0]
    ),
    "threshold below zero: A = 0 is kept": case(
        [1, 1, 0], [F, T, F], [T, T, F], [T, T, T], [0.25, -0.6875, -1.625], away=[1.0, 0.0, 1.0]
    ),
    "A = 0 is kept at any divergence": case([9.0], [T], [T], [T], 0.25, away=0.0),
    "rho = 1 is kept at any divergence": case([9.0], [T], [T], [T], 0.25, ratio=0.0),
    "A < 0 and rho < 1 moves away": case([0.5], [F], [T], [T], 0.25, away=-1.0, ratio=-0.5),
    "A < 0 and rho > 1 is corrective": case([0.5], [T], [T], [T], 0.25, away=-1.0, ratio=0.5),
    "A > 0 and rho < 1 is corrective": case([0.5], [T], [T], [T], 0.25, away=1.0, ratio=-0.5),
    "the budget grows by delta_b W_{t-1}, not W_t": case([0.25, 0.09375], [T, F], [F, F], [F, T], [0.25, 0.0625]),
    "S_{t-1}, not S_t, is in the threshold": case([0.125, 0.1875], [T, T], [F, F], [F, F], [0.25, 0.1875]),
    "weights scale D in the token cause": case([0, 0.5], [T, T], [F, F], [F, F], 0.25, weights=[1.0, 0.5]),
    "weights scale D in S and delta_b in W": case(
        [0.5, 0.25, 0.25], [T, T, F], [F, F, F], [F, F, T], [0.25, 0.125, 0.125], weights=[0.5, 0.5, 1.0], delta_b=0.25
    ),
    "the slack is capped at delta": case([0, 0, 0.3125], [T, T, F], [F, F, T], [F, F, F], 0.25, delta_b=4.0),
    "no budget: the prefix never refuses": case(
        [0.25] * 4 + [0.5], [T] * 4 + [F], [F] * 4 + [T], [F] * 5, 0.25, delta_b=None
    ),
    "zero budget: delta is spent once": case(
        [0.125, 0.125, 0.0625, 0.0], [T, T, F, F], [F] * 4, [F, F, T, T], [0.25, 0.125, 0.0, -0.0625], delta_b=0.0
    ),
    "holes and padding are never kept and never counted": case(
        [0.25, NAN, 0.0625, INF, 0.125],
        [T, F, T, F, F],
        [F] * 5,
        [F, F, F, F, T],
        [0.25, 0, 0.0625, 0, 0.0625],
        mask=[1, 0, 1, 0, 1],
        weights=[1.0, NAN, 1.0, INF, 1.0],
        away=[1.0, NAN, 1.0, INF, 1.0],
        ratio=[0.5, NAN, 0.5, INF, 0.5],
    ),
}


@pytest.mark.parametrize(("inputs", "weights", "delta_b", "expected"), CPPO.values(), ids=CPPO.keys())
def test_cppo_mask_by_hand(inputs, weights, delta_b, expected):
    inputs = [torch.tensor([values], dtype=torch.float32) for values in inputs]
    budget = None if delta_b is None else torch.tensor([delta_b])
    region = cppo_mask(*inputs, delta=QUARTER, weights=torch.tensor([weights]), delta_b=budget)
    for field, want in zip(region[:4], expected, strict=True):
        assert field.tolist() == [want]


def test_each_row_has_its_own_budget():
    divergence, ones = torch.tensor([[0.25, 0.125]] * 3), torch.ones(3, 2)
    region = cppo_mask(
        ones, ones, divergence, ones, delta=0.25, weights=ones, delta_b=torch.tensor([0.0, 0.0625, 0.125])
    )
    assert region.threshold[:, 1].tolist() == [0.0, 0.0625, 0.125]
    assert region.keep[:, 1].tolist() == [False, False, True]


DPPO = {
    "at delta: inclusive": ([0.25], [1.0], [0.5], [T], [F]),
    "above delta": ([0.5], [1.0], [0.5], [F], [T]),
    "corrective above delta": ([0.5], [-1.0], [0.5], [T], [T]),
    "A = 0 above delta": ([0.5], [0.0], [0.5], [T], [T]),
    "tokens do not see each other": ([0.5, 0.25, 0.5, 0.0], [1.0] * 4, [0.5] * 4, [F, T, F, T], [T, F, T, F]),
}


@pytest.mark.parametrize(("divergence", "advantages", "ratio", "keep", "token"), DPPO.values(), ids=DPPO.keys())
def test_dppo_mask_by_hand(divergence, advantages, ratio, keep, token):
    ratio, advantages, divergence = (torch.tensor([x]) for x in (ratio, advantages, divergence))
    region = dppo_mask(ratio, advantages, divergence, torch.ones_like(divergence), delta=0.25)
    assert region.keep.tolist() == [keep]
    assert region.token_exceeded.tolist() == [token]
    assert not region.prefix_exceeded.any()
    assert region.threshold.eq(0.25).all()


# divergence, mask, delta_max, delta_avg -> keep the response?, token_exceeded, prefix_exceeded, threshold
TRM = {
    "max at the limit: inclusive": ([0.25, 0.0], [1, 1], 0.25, None, T, [F, F], F, 0.25),
    "max above rejects the whole response": ([0.5, 0.0], [1, 1], 0.25, None, F, [T, F], F, 0.25),
    "max looks forward too": ([0.0, 0.0, 0.5], [1, 1, 1], 0.25, None, F, [F, F, T], F, 0.25),
    "mean at the limit: inclusive": ([0.25, 0.0], [1, 1], None, 0.125, T, [F, F], F, 0.125),
    "mean above rejects the whole response": ([0.5, 0.0], [1, 1], None, 0.125, F, [F, F], T, 0.125),
    "mean over valid tokens only": ([0.5, NAN, 0.0, 0.0], [1, 0, 1, 0], None, 0.1875, F, [F] * 4, T, 0.1875),
    "padding does not reject": ([0.125, INF, 9.0], [1, 0, 0], 0.25, 0.25, T, [F] * 3, F, 0.25),
    "both limits: max alone fails": ([0.5, 0.0, 0.0, 0.0], [1] * 4, 0.25, 0.125, F, [T, F, F, F], F, 0.25),
    "both limits: mean alone fails": ([0.25, 0.25], [1, 1], 0.5, 0.125, F, [F, F], T, 0.5),
    "both limits: both fail": ([1.0, 1.0], [1, 1], 0.5, 0.125, F, [T, T], T, 0.5),
    "both limits: both hold": ([0.25, 0.0], [1, 1], 0.25, 0.125, T, [F, F], F, 0.25),
}


@pytest.mark.parametrize(
    ("divergence", "mask", "delta_max", "delta_avg", "keep", "token", "prefix", "threshold"),
    TRM.values(),
    ids=TRM.keys(),
)
def test_trm_mask_by_hand(divergence, mask, delta_max, delta_avg, keep, token, prefix, threshold):
    region = trm_mask(torch.tensor([divergence]), torch.tensor([mask]), delta_max=delta_max, delta_avg=delta_avg)
    valid = [bool(m) for m in mask]
    assert region.keep.tolist() == [[keep and m for m in valid]]
    assert region.token_exceeded.tolist() == [token]
    assert region.prefix_exceeded.tolist() == [[prefix and m for m in valid]]
    assert region.threshold.tolist() == [[threshold if m else 0.0 for m in valid]]


def test_trm_rejects_one_row_and_keeps_the_next():
    region = trm_mask(torch.tensor([[0.5, 0.0], [0.0, 0.25]]), torch.ones(2, 2), delta_max=0.25)
    assert region.keep.tolist() == [[F, F], [T, T]]


# divergence, advantages, delta_b, weights -> gate   (delta = 1/4, log-ratio 1/2)
GATE = {
    "x = 1 is open": ([0.25], [1.0], 0.0625, [1.0], [1.0]),
    "x = 2 by the token": ([0.0, 0.0, 0.0, 0.0, 0.5], [1.0] * 5, 0.0625, [1.0] * 5, [1.0, 1.0, 1.0, 1.0, 0.5]),
    "S_t includes token t": ([0.25, 0.25], [1.0, 1.0], 0.0, [1.0, 1.0], [1.0, 0.5]),
    "x = S_t / (delta + delta_b W_{t-1})": ([0.75, 0.25], [1.0, 1.0], 0.25, [1.0, 1.0], [1 / 3, 0.5]),
    "the prefix alone": ([0.25, 0.25, 0.25, 0.25], [1.0] * 4, 0.0625, [1.0] * 4, [1.0, 0.625, 0.5, 0.4375]),
    "corrective is open": ([0.5, 0.5], [-1.0, 1.0], 0.0625, [1.0, 1.0], [1.0, 0.3125]),
    "A = 0 is open": ([0.5, 0.5], [0.0, 1.0], 0.0625, [1.0, 1.0], [1.0, 0.3125]),
    "no budget": ([0.5, 0.25, 1.0], [1.0] * 3, None, [1.0] * 3, [0.5, 1.0, 0.25]),
    "weights": ([0.5, 1.0], [1.0, 1.0], 0.25, [0.5, 0.5], [1.0, 0.5]),
}


@pytest.mark.parametrize(("divergence", "advantages", "delta_b", "weights", "expected"), GATE.values(), ids=GATE.keys())
def test_soft_gate_by_hand(divergence, advantages, delta_b, weights, expected):
    divergence, advantages, weights = (torch.tensor([x]) for x in (divergence, advantages, weights))
    ratio, budget = torch.full_like(divergence, 0.5), None if delta_b is None else torch.tensor([delta_b])
    arguments, options = (
        (ratio, advantages, divergence, torch.ones_like(ratio)),
        {"weights": weights, "delta_b": budget},
    )
    gate = soft_gate(cppo_mask(*arguments, delta=0.25, **options))
    assert gate.tolist()[0] == pytest.approx(expected, rel=1e-6)
    assert torch.equal(soft_gate(*arguments, delta=0.25, **options), gate)


def test_excess_by_hand():
    """x_t whatever the direction of the update; 0 on padding; of TRM: the worse of its two quotients."""
    divergence, ones = torch.tensor([[0.25, 0.25, 0.5, 9.0]]), torch.ones(1, 4)
    valid, budget = torch.tensor([[1, 1, 1, 0]]), torch.tensor([0.25])
    for advantages in (ones, -ones):
        region = cppo_mask(ones, advantages, divergence, valid, delta=0.25, weights=ones, delta_b=budget)
        assert region.excess.tolist() == [[1.0, 1.0, 2.0, 0.0]]  # S / bound: 0.25 / 0.25, 0.5 / 0.5, 1 / 0.75
    tight = cppo_mask(ones, ones, divergence, valid, delta=0.25, weights=ones, delta_b=torch.zeros(1))
    assert tight.excess.tolist() == [[1.0, 2.0, 4.0, 0.0]]
    assert dppo_mask(ones, ones, divergence, valid, delta=0.25).excess.tolist() == [[1.0, 1.0, 2.0, 0.0]]
    even = torch.tensor([[0.25, 0.5, 0.75, 9.0]])
    assert trm_mask(even, valid, delta_max=0.25).excess.tolist() == [[1.0, 2.0, 3.0, 0.0]]
    assert trm_mask(even, valid, delta_max=0.25, delta_avg=0.25).excess.tolist() == [[2.0, 2.0, 3.0, 0.0]]
