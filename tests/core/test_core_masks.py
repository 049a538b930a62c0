"""Hard masks (Eq. 8-10, Table 1) and the soft gate (Appendix C) against slow loops, over random batches."""

import core_reference as slow
import pytest
import torch
from core_cases import FLOAT_DTYPES, MASK_DTYPES, generator, lattice_inputs, mask_inputs, ragged_mask, rows_of, spoil

from cppo_verl.core.masks import TrustRegion, cppo_mask, dppo_mask, soft_gate, trm_mask

FIELDS = ("keep", "token_exceeded", "prefix_exceeded", "threshold", "excess")
NEAR = 2e-6  # float32 may decide differently from float64 only this close to a threshold


def cppo_rows(named, options):
    budgets = options["delta_b"]
    budgets = [None] * len(named["divergence"]) if budgets is None else budgets.double().tolist()
    for row, b in zip(rows_of(*named.values(), options["weights"]), budgets, strict=True):
        yield row[:4], {"delta": options["delta"], "weights": row[4], "delta_b": b}


def assert_region(region, expected, near=NEAR):
    """Every field equal, except decisions closer to a threshold than float32 can tell."""
    assert isinstance(region, TrustRegion)
    assert region._fields == FIELDS
    for name in FIELDS[:3]:
        value = getattr(region, name)
        want = torch.tensor([[getattr(d, name) for d in row] for row in expected])
        clear = torch.tensor([[d.margin >= near for d in row] for row in expected])
        assert value.dtype == torch.bool
        assert value.shape == want.shape
        assert clear.float().mean() > 0.9
        assert torch.equal(value[clear], want[clear]), name
    want = torch.tensor([[d.threshold for d in row] for row in expected])
    assert region.threshold.dtype == torch.float32
    torch.testing.assert_close(region.threshold, want, atol=max(near, 2e-6), rtol=1e-6)


def every_cause(regions):
    """How many tokens: kept, masked by token only, by prefix only, by both."""
    keep, token, prefix = (torch.cat([getattr(r, f).flatten() for r in regions]) for f in FIELDS[:3])
    return [x.sum().item() for x in (keep, ~keep & token & ~prefix, ~keep & ~token & prefix, ~keep & token & prefix)]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (5, 2), (6, 23), (3, 200)], ids=str)
def test_cppo_mask_matches_the_slow_loop(shape, mask_dtype, dtype):
    for seed in range(5):
        named, options = mask_inputs(seed, *shape, dtype=dtype, mask_dtype=mask_dtype)
        for delta_b in (options["delta_b"], None, torch.zeros(shape[0])):
            options = {**options, "delta_b": delta_b}
            expected = [slow.cppo_mask(*row, **kw) for row, kw in cppo_rows(named, options)]
            assert_region(cppo_mask(**named, **options), expected, near=2e-5)


def test_the_random_batches_reach_every_cause():
    regions = [cppo_mask(**named, **options) for named, options in (mask_inputs(s, 6, 60) for s in range(20))]
    assert min(every_cause(regions)) > 20
    regions = [cppo_mask(**named, **options) for named, options in (lattice_inputs(s) for s in range(40))]
    assert min(every_cause(regions)) > 20


@pytest.mark.parametrize("seed", range(40))
def test_cppo_mask_is_exact_where_thresholds_are_hit_exactly(seed):
    """On a dyadic lattice float32 has no rounding, so every decision counts, ties included."""
    named, options = lattice_inputs(seed)
    for delta_b in (options["delta_b"], None, torch.zeros(6)):
        options = {**options, "delta_b": delta_b}
        expected = [slow.cppo_mask(*row, **kw) for row, kw in cppo_rows(named, options)]
        assert_region(cppo_mask(**named, **options), expected, near=0.0)


def test_the_lattice_hits_thresholds_often():
    ties = 0
    for seed in range(40):
        named, options = lattice_inputs(seed)
        for row, kw in cppo_rows(named, options):
            ties += sum(d.margin == 0.0 for d in slow.cppo_mask(*row, **kw))
    assert ties > 100


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (6, 23)], ids=str)
def test_dppo_mask_matches_the_slow_loop(shape, mask_dtype, dtype):
    for seed in range(5):
        named, _ = mask_inputs(seed, *shape, dtype=dtype, mask_dtype=mask_dtype)
        expected = [slow.dppo_mask(*row, delta=0.15) for row in rows_of(*named.values())]
        assert_region(dppo_mask(**named, delta=0.15), expected)


@pytest.mark.parametrize("seed", range(10))
def test_dppo_mask_is_exact_where_thresholds_are_hit_exactly(seed):
    named, _ = lattice_inputs(seed)
    expected = [slow.dppo_mask(*row, delta=6 / 64) for row in rows_of(*named.values())]
    assert_region(dppo_mask(**named, delta=6 / 64), expected, near=0.0)


TRM_LIMITS = [(0.08, None), (None, 0.02), (0.1, 0.021), (1e-4, None), (None, 10.0), (10.0, 1e-5)]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (24, 9)], ids=str)
def test_trm_mask_matches_the_slow_loop(shape, mask_dtype, dtype):
    for seed in range(4):
        g = generator(seed)
        mask = ragged_mask(g, *shape)
        divergence = spoil((0.1 * torch.rand(shape, generator=g) ** 3).to(dtype), mask, seed)
        for delta_max, delta_avg in TRM_LIMITS:
            limits = {"delta_max": delta_max, "delta_avg": delta_avg}
            expected = [slow.trm_mask(*row, **limits) for row in rows_of(divergence, mask)]
            assert_region(trm_mask(divergence, mask.to(mask_dtype), **limits), expected, near=1e-8)


@pytest.mark.parametrize("seed", range(20))
def test_trm_mask_is_exact_where_thresholds_are_hit_exactly(seed):
    g = generator(seed)
    mask = torch.arange(8) < torch.tensor([1, 2, 4, 8] * 3)[:, None]  # means stay dyadic
    divergence = spoil(torch.randint(0, 5, (12, 8), generator=g) / 64, mask, seed)
    for limits in [(3 / 64, None), (None, 2 / 64), (4 / 64, 2 / 64), (3 / 64, 2.25 / 64)]:
        limits = dict(zip(("delta_max", "delta_avg"), limits, strict=True))
        expected = [slow.trm_mask(*row, **limits) for row in rows_of(divergence, mask)]
        assert_region(trm_mask(divergence, mask, **limits), expected, near=0.0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (5, 2), (6, 23), (3, 200)], ids=str)
def test_soft_gate_matches_the_slow_loop(shape, mask_dtype, dtype):
    for seed in range(5):
        named, options = mask_inputs(seed, *shape, dtype=dtype, mask_dtype=mask_dtype)
        for delta_b in (options["delta_b"], None, torch.zeros(shape[0])):
            options = {**options, "delta_b": delta_b}
            expected = torch.tensor([slow.soft_gate(*row, **kw) for row, kw in cppo_rows(named, options)])
            region = cppo_mask(**named, **options)
            gate = soft_gate(region)
            assert gate.dtype == torch.float32
            assert gate.shape == shape
            torch.testing.assert_close(gate, expected[..., 0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(region.excess, expected[..., 1], atol=1e-6, rtol=1e-5)
            assert torch.equal(soft_gate(**named, **options), gate)


@pytest.mark.parametrize("seed", range(20))
def test_soft_gate_is_one_exactly_where_the_hard_mask_keeps(seed):
    """x <= 1 exactly where the hard constraint holds; corrective tokens are kept by both. Ties included (lattice)."""
    for named, options in (lattice_inputs(seed), mask_inputs(seed, 6, 40)):
        for delta_b in (options["delta_b"], None):
            options = {**options, "delta_b": delta_b}
            gate, keep = soft_gate(**named, **options), cppo_mask(**named, **options).keep
            valid = named["response_mask"]
            assert torch.equal(gate.eq(1), keep)
            assert (gate[valid] > 0).all()
            assert (gate <= 1).all()
            assert gate[~valid].eq(0).all()


@pytest.mark.parametrize("seed", range(10))
def test_soft_gate_is_admissible(seed):
    """x g(x) <= 1, with x from the slow loop, on the tokens that move away."""
    named, options = mask_inputs(seed, 6, 60)
    gate = soft_gate(**named, **options)
    for out, (row, kw) in zip(gate.double().tolist(), cppo_rows(named, options), strict=True):
        for g, (_, x), r, a, valid in zip(out, slow.soft_gate(*row, **kw), row[0], row[1], row[3], strict=True):
            if valid and slow.moves_away(r, a):
                assert x * g <= 1 + 1e-5


@pytest.mark.parametrize("seed", range(10))
def test_a_masked_token_always_has_a_cause_and_a_kept_one_an_excuse(seed):
    """keep = valid and (corrective, or neither cause): the two causes of the metrics cover every mask."""
    for named, options in (mask_inputs(seed, 8, 60), lattice_inputs(seed)):
        region = cppo_mask(**named, **options)
        valid = named["response_mask"]
        away = (named["advantages"].sign() * named["log_ratio"].sign()) > 0
        exceeded = region.token_exceeded | region.prefix_exceeded
        assert torch.equal(region.keep, valid & ~(away & exceeded))
        assert torch.equal(region.excess > 1, exceeded)


def test_a_float32_divergence_equal_to_a_threshold_that_float32_cannot_hold_is_kept():
    """0.15 has no exact float32: D = float32(0.15) is a threshold hit exactly, not one exceeded by 6e-9."""
    divergence, ones = torch.full((1, 1), 0.15), torch.ones(1, 1)
    for delta_b in (None, torch.tensor([0.015])):
        region = cppo_mask(ones, ones, divergence, ones, delta=0.15, weights=ones, delta_b=delta_b)
        assert region.keep.all()
        assert not region.token_exceeded.any()
        assert not region.prefix_exceeded.any()
        assert region.excess.item() == 1
    assert dppo_mask(ones, ones, divergence, ones, delta=0.15).keep.all()
    assert trm_mask(divergence, ones, delta_max=0.15).keep.all()
    assert trm_mask(divergence, ones, delta_avg=0.15).keep.all()


def test_rows_without_a_valid_token_keep_nothing():
    junk, none = torch.full((2, 3), float("nan")), torch.zeros(2, 3)
    for budget in (None, torch.ones(2)):
        region = cppo_mask(junk, junk, junk, none, delta=0.1, weights=junk, delta_b=budget)
        gate = soft_gate(junk, junk, junk, none, delta=0.1, weights=junk, delta_b=budget)
        assert not any(field.any() for field in region)
        assert not gate.any()
    for region in (dppo_mask(junk, junk, junk, none, delta=0.1), trm_mask(junk, none, delta_max=0.1, delta_avg=0.1)):
        assert not any(field.any() for field in region)


@pytest.mark.parametrize("value", [100.0, -200.0, float("-inf")])
def test_zero_advantage_is_kept_whatever_the_ratio(value):
    """rho overflows float32 beyond 88: 0 * inf must not turn into a refusal."""
    one = torch.ones(1, 1)
    ratio = torch.tensor([[value]])
    region = cppo_mask(ratio, 0 * one, one, one, delta=0.1, weights=one, delta_b=torch.zeros(1))
    gate = soft_gate(ratio, 0 * one, one, one, delta=0.1, weights=one, delta_b=torch.zeros(1))
    assert region.keep.all()
    assert gate.eq(1).all()
    assert dppo_mask(ratio, 0 * one, one, one, delta=0.1).keep.all()


def test_an_infinite_divergence_blocks_the_rest_of_the_response():
    """A reduced KL can be infinite; S stays infinite, and no NaN may turn that into a keep."""
    divergence = torch.tensor([[0.0, float("inf"), 0.0, 0.0]])
    ones = torch.ones(1, 4)
    region = cppo_mask(ones, ones, divergence, ones, delta=0.1, weights=ones, delta_b=torch.ones(1))
    assert region.keep.tolist() == [[True, False, False, False]]
    assert region.prefix_exceeded.tolist() == [[False, True, True, True]]
    gate = soft_gate(ones, ones, divergence, ones, delta=0.1, weights=ones, delta_b=torch.ones(1))
    assert gate.tolist() == [[1, 0, 0, 0]]


def test_an_infinite_divergence_leaves_its_own_threshold_a_number():
    """c_t looks at S_{t-1}, which is finite until after the infinite token."""
    divergence = torch.tensor([[0.0, float("inf"), 0.0, 0.0]])
    ones = torch.ones(1, 4)
    region = cppo_mask(ones, ones, divergence, ones, delta=0.25, weights=ones, delta_b=torch.ones(1))
    assert region.threshold.tolist() == [[0.25, 0.25, float("-inf"), float("-inf")]]
