"""Properties of the masks and weights: reductions to one another, causality, invariances, no writes on inputs."""

import pytest
import torch
from core_cases import compact, generator, lattice_inputs, mask_inputs, ragged_mask, spoil, surrogate_inputs, vocabulary

from cppo_verl.core import divergence as divergences
from cppo_verl.core.masks import TrustRegion, cppo_mask, dppo_mask, soft_gate, trm_mask
from cppo_verl.core.surrogate import cispo_loss, clip_loss, minpro_loss, ratio_loss
from cppo_verl.core.weights import position_weights, prefix_budget

TRM = {"delta_max": 0.3, "delta_avg": 0.04}
EPS = {"eps_low": 0.2, "eps_high": 0.28}


def by_dppo(named, options):
    return dppo_mask(**named, delta=options["delta"])


def by_trm(named, options):
    return trm_mask(named["divergence"], named["response_mask"], **TRM)


def by_cppo(named, options):
    return cppo_mask(**named, **options)


def by_gate(named, options):
    return (soft_gate(**named, **options),)


RULES = {"cppo": by_cppo, "dppo": by_dppo, "trm": by_trm, "gate": by_gate}
CAUSAL = {name: rule for name, rule in RULES.items() if name != "trm"}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def same(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=0, equal_nan=True)


def pick(named, options, index):
    """Some rows, or the same rows in another order."""
    weights, budget = options["weights"][index], options["delta_b"][index]
    return {k: v[index] for k, v in named.items()}, {**options, "weights": weights, "delta_b": budget}


# --- one rule is another


@pytest.mark.parametrize("big", [1e4, float("inf"), None], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_no_weight_and_a_boundless_budget_is_dppo(seed, big):
    for named, options in (mask_inputs(seed), lattice_inputs(seed)):
        rows = named["divergence"].shape[0]
        budget = None if big is None else torch.full((rows,), big)
        ones = position_weights(named["response_mask"], 0.8, schedule="uniform")
        region = cppo_mask(**named, delta=options["delta"], weights=ones, delta_b=budget)
        expected = by_dppo(named, options)
        assert torch.equal(region.keep, expected.keep)
        assert torch.equal(region.token_exceeded, expected.token_exceeded)
        assert torch.equal(region.threshold, expected.threshold)


@pytest.mark.parametrize("seed", range(4))
def test_without_a_budget_the_prefix_is_never_a_cause(seed):
    named, options = mask_inputs(seed)
    assert not by_dppo(named, options).prefix_exceeded.any()
    assert not cppo_mask(**named, **{**options, "delta_b": None}).prefix_exceeded.any()


@pytest.mark.parametrize("seed", range(6))
def test_w_min_one_is_the_uniform_schedule(seed):
    mask = ragged_mask(generator(seed), 6, 20)
    for schedule in ("linear", "shuffled"):
        weights = position_weights(mask, 1.0, schedule=schedule, generator=generator(seed))
        assert torch.equal(weights, position_weights(mask, 0.5, schedule="uniform"))


@pytest.mark.parametrize("seed", range(6))
def test_a_larger_budget_or_threshold_never_keeps_less(seed):
    named, options = mask_inputs(seed, 6, 50)
    base = by_cppo(named, options).keep
    for change in ({"delta_b": options["delta_b"] + 0.02}, {"delta": 0.2}, {"delta_b": None}):
        assert (by_cppo(named, {**options, **change}).keep | ~base).all()


# --- corrective updates


@each_rule
@pytest.mark.parametrize("seed", range(6))
def test_corrective_updates_are_never_blocked(seed, rule):
    named, options = mask_inputs(seed, 6, 40)
    named["divergence"] = named["divergence"] * 50
    valid = named["response_mask"]
    corrective = valid & (named["advantages"] * (named["log_ratio"].exp() - 1) <= 0)
    assert corrective.sum() > 20
    kept = rule(named, options)[0]
    if rule is by_trm:  # TRM knows no direction: it rejects whole responses
        assert not kept[valid.any(1)].any()
    else:
        assert kept[corrective].eq(1).all()


@pytest.mark.parametrize("seed", range(6))
def test_causes_and_thresholds_do_not_depend_on_the_direction(seed):
    named, options = mask_inputs(seed)
    region = by_cppo(named, options)
    turned = by_cppo({**named, "advantages": -named["advantages"]}, options)
    assert all(torch.equal(a, b) for a, b in zip(region[1:], turned[1:], strict=True))


# --- causality


@pytest.mark.parametrize("rule", CAUSAL.values(), ids=CAUSAL.keys())
@pytest.mark.parametrize("seed", range(6))
def test_a_token_never_alters_what_comes_before_it(seed, rule):
    named, options = mask_inputs(seed, 4, 16)
    before = rule(named, options)
    for t in range(16):
        other, _ = mask_inputs(seed + 100, 4, 16)
        changed = {k: v.clone() for k, v in named.items()}
        for name in ("log_ratio", "advantages", "divergence"):
            changed[name][:, t:] = torch.nan_to_num(other[name][:, t:], 5.0, 5.0, -5.0).abs()
        after = rule(changed, options)
        assert all(torch.equal(a[:, :t], b[:, :t]) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("rule", CAUSAL.values(), ids=CAUSAL.keys())
@pytest.mark.parametrize("seed", range(6))
def test_a_token_sees_earlier_tokens_through_their_divergence_only(seed, rule):
    """Earlier directions decide what was kept there, and kept or masked S and W are the same."""
    named, options = mask_inputs(seed, 4, 16)
    before = rule(named, options)
    for t in range(16):
        changed = {k: v.clone() for k, v in named.items()}
        changed["advantages"][:, :t] = -changed["advantages"][:, :t]
        after = rule(changed, options)
        assert all(torch.equal(a[:, t:], b[:, t:]) for a, b in zip(before, after, strict=True))


def test_an_earlier_divergence_does_alter_a_later_decision():
    """The other half: the prefix is really there (for cppo and the gate), and absent from dppo."""
    ones = torch.ones(1, 2)
    for first, kept in [(0.0, True), (0.15, False)]:
        divergence = torch.tensor([[first, 0.1]])
        region = cppo_mask(ones, ones, divergence, ones, delta=0.15, weights=ones, delta_b=torch.zeros(1))
        assert region.keep[0, 1].item() is kept
        assert dppo_mask(ones, ones, divergence, ones, delta=0.15).keep[0, 1]


# --- invariances


@each_rule
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_independent(seed, rule):
    """Batch split and row order."""
    named, options = mask_inputs(seed)
    whole = rule(named, options)
    order = torch.randperm(5, generator=generator(seed))
    shuffled = rule(*pick(named, options, order))
    assert all(torch.equal(a[order], b) for a, b in zip(whole, shuffled, strict=True))
    parts = [rule(*pick(named, options, slice(i, i + 1))) for i in range(5)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=False))


@each_rule
@pytest.mark.parametrize("seed", range(6))
def test_padding_to_the_right_changes_nothing(seed, rule):
    named, options = mask_inputs(seed)
    junk = torch.full((5, 9), float("nan"))
    wide = {k: torch.cat([v, junk.to(v.dtype) if v.is_floating_point() else junk != junk], 1) for k, v in named.items()}
    wide["response_mask"][:, 23:] = False
    after = rule(wide, {**options, "weights": torch.cat([options["weights"], junk], 1)})
    for a, b in zip(rule(named, options), after, strict=True):
        assert torch.equal(a, b[:, :23])
        assert not b[:, 23:].any()


@each_rule
@pytest.mark.parametrize("seed", range(6))
def test_holes_change_nothing(seed, rule):
    """Valid tokens moved together give the same decisions: tokens in a hole are not there."""
    named, options = mask_inputs(seed)
    mask = named["response_mask"]
    dense = {k: compact(v, mask) for k, v in named.items()}
    after = rule(dense, {**options, "weights": compact(options["weights"], mask)})
    before = rule(named, options)
    same([x[mask] for x in before], [x[dense["response_mask"]] for x in after])


@each_rule
@pytest.mark.parametrize("seed", range(4))
def test_values_on_padding_never_matter(seed, rule):
    named, options = mask_inputs(seed)
    mask = named["response_mask"]
    again = {k: v if k == "response_mask" else spoil(v, mask, seed + 7) for k, v in named.items()}
    after = rule(again, {**options, "weights": spoil(options["weights"], mask, seed + 8)})
    for a, b in zip(rule(named, options), after, strict=True):
        assert torch.equal(a, b)
        assert not a[~mask].any()


@pytest.mark.parametrize("seed", range(4))
def test_weights_and_budget_are_invariant_too(seed):
    mask = ragged_mask(generator(seed), 6, 20)
    divergence = spoil(0.1 * torch.rand(6, 20, generator=generator(seed)), mask, seed)
    order = torch.randperm(6, generator=generator(seed))
    wide = torch.cat([mask, torch.zeros(6, 5, dtype=torch.bool)], 1)
    dense = compact(mask, mask)
    weights = position_weights(mask, 0.6)
    assert torch.equal(weights[order], position_weights(mask[order], 0.6))
    assert torch.equal(weights, torch.cat([position_weights(row[None], 0.6) for row in mask]))
    assert torch.equal(weights, position_weights(wide, 0.6)[:, :20])
    assert torch.equal(weights[mask], position_weights(dense, 0.6)[dense])
    calibrate = {"delta_b": 0.01, "quantile": 0.9, "max_factor": 50.0}
    budget = prefix_budget(divergence, mask, **calibrate)
    parts = [prefix_budget(d[None], m[None], **calibrate) for d, m in zip(divergence, mask, strict=True)]
    wide_divergence = torch.cat([divergence, torch.full((6, 5), float("nan"))], 1)
    same([budget[order]], [prefix_budget(divergence[order], mask[order], **calibrate)])
    same([budget], [torch.cat(parts)])
    same([budget], [prefix_budget(wide_divergence, wide, **calibrate)])
    same([budget], [prefix_budget(compact(divergence, mask), dense, **calibrate)])


# --- purity


def every_call():
    """Each public function once, as (name, function, positional tensors, keyword arguments)."""
    named, options = mask_inputs(0)
    loss, mask = surrogate_inputs(0, 5, 23)
    top, _ = vocabulary(0)
    response_mask = named["response_mask"]
    yield "position_weights", position_weights, [response_mask], {"w_min": 0.8}
    shuffle = {"w_min": 0.8, "schedule": "shuffled", "generator": generator(0)}
    yield "shuffled", position_weights, [response_mask], shuffle
    yield "prefix_budget", prefix_budget, [named["divergence"], response_mask], {"delta_b": 0.02, "quantile": 0.9}
    yield "fixed budget", prefix_budget, [named["divergence"], response_mask], {"delta_b": 0.02}
    yield "cppo_mask", cppo_mask, list(named.values()), options
    yield "soft_gate", soft_gate, list(named.values()), options
    yield "dppo_mask", dppo_mask, list(named.values()), {"delta": 0.15}
    yield "trm_mask", trm_mask, [named["divergence"], response_mask], TRM
    pair = [loss["log_prob"], loss["rollout_log_prob"]]
    yield "binary_tv", divergences.binary_tv, pair, {}
    yield "binary_kl", divergences.binary_kl, pair, {}
    yield "topk_tv", divergences.topk_tv, list(top.values()), {}
    yield "topk_kl", divergences.topk_kl, list(top.values()), {}
    yield "k3", divergences.k3, [pair[0] - pair[1]], {}
    yield "ratio_loss", ratio_loss, [*loss.values(), mask], {}
    yield "clip_loss", clip_loss, list(loss.values()), EPS
    yield "cispo_loss", cispo_loss, list(loss.values()), EPS
    yield "minpro_loss", minpro_loss, [*loss.values(), mask], EPS


CALLS = [pytest.param(*call[1:], id=call[0]) for call in every_call()]


@pytest.mark.parametrize(("function", "tensors", "options"), CALLS)
def test_no_function_writes_on_its_inputs(function, tensors, options):
    options = dict(options)
    given = [*tensors, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    copies = [t.clone() for t in given]
    tensors = [tensors[0].clone().requires_grad_(), *tensors[1:]] if tensors[0].is_floating_point() else tensors
    out = function(*tensors, **options)
    if isinstance(out, torch.Tensor) and out.requires_grad:
        out.sum().backward()
    assert all(torch.equal(a.nan_to_num(17.0), b.nan_to_num(17.0)) for a, b in zip(given, copies, strict=True))
    # the clone that carried the gradient is the same as well
    assert torch.equal(tensors[0].detach().nan_to_num(17.0), copies[0].nan_to_num(17.0))


@pytest.mark.parametrize(("function", "tensors", "options"), CALLS)
def test_results_are_float32_or_bool_and_only_losses_carry_a_gradient(function, tensors, options):
    is_loss = function.__name__.endswith("_loss")
    tensors = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    out = function(*tensors, **options)
    for value in out if isinstance(out, TrustRegion) else [out]:
        assert value.dtype in (torch.float32, torch.bool)
        assert value.requires_grad == is_loss
