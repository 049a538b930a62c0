"""Per-token losses (Eq. 11, Table 1): values and gradients against closed forms, gradient flow, extremes."""

import math

import core_reference as slow
import pytest
import torch
from core_cases import FLOAT_DTYPES, MASK_DTYPES, generator, spoil, surrogate_inputs

from cppo_verl.core.masks import cppo_mask
from cppo_verl.core.surrogate import cispo_loss, clip_loss, minpro_loss, ratio_loss

EPS = {"eps_low": 0.2, "eps_high": 0.28}


def loss_and_slope(function, inputs, *args, **kwargs):
    """The loss and its exact gradient with respect to log pi (each loss depends on its own token only)."""
    log_prob = inputs["log_prob"].clone().requires_grad_()
    loss = function(log_prob, inputs["rollout_log_prob"], inputs["advantages"], *args, **kwargs)
    assert loss.dtype == torch.float32
    assert loss.shape == log_prob.shape
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    return loss.detach(), slope


def each_token(function, inputs, *extra):
    """Apply a scalar reference token by token; two float tensors: loss, slope."""
    columns = [inputs[k].double() for k in ("log_prob", "rollout_log_prob", "advantages")]
    columns += [x.double() for x in extra]
    pairs = [function(*values) for values in zip(*(c.flatten().tolist() for c in columns), strict=True)]
    shape = inputs["log_prob"].shape
    return [torch.tensor([p[i] for p in pairs]).reshape(shape) for i in (0, 1)]


def assert_matches(got, want):
    loss, slope = got
    torch.testing.assert_close(loss, want[0], atol=1e-6, rtol=3e-5)
    coarse = slope.dtype == torch.bfloat16
    torch.testing.assert_close(slope.float(), want[1], atol=1e-6, rtol=1e-2 if coarse else 3e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 19)], ids=str)
@pytest.mark.parametrize("cap", [20.0, 1.5, None], ids=str)
def test_ratio_loss_matches_the_closed_form(cap, shape, dtype):
    for seed in range(5):
        inputs, mask = surrogate_inputs(seed, *shape, dtype=dtype)
        soft = torch.rand(shape, generator=generator(seed)) * mask
        for gate in [mask.to(m) for m in MASK_DTYPES] + [soft]:
            want = each_token(lambda lp, mu, a, g: slow.ratio_loss(lp, mu, a, g, cap), inputs, gate)
            assert_matches(loss_and_slope(ratio_loss, inputs, gate, ratio_cap=cap), want)


def off_the_edge(inputs, eps_low, eps_high):
    """Keep ratios off the corners of the clip, where the slope is a convention."""
    ratio = (inputs["log_prob"].double() - inputs["rollout_log_prob"].double()).exp()
    near = ((ratio - 1 + eps_low).abs() < 1e-3) | ((ratio - 1 - eps_high).abs() < 1e-3)
    inputs["log_prob"] = torch.where(near, inputs["rollout_log_prob"], inputs["log_prob"])
    return inputs


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 19)], ids=str)
@pytest.mark.parametrize("eps", [(0.2, 0.28), (0.1, 0.5)], ids=str)
def test_clip_loss_matches_the_closed_form(eps, shape, dtype):
    for seed in range(5):
        inputs = off_the_edge(surrogate_inputs(seed, *shape, dtype=dtype)[0], *eps)
        want = each_token(lambda lp, mu, a: slow.clip_loss(lp, mu, a, *eps), inputs)
        assert_matches(loss_and_slope(clip_loss, inputs, eps_low=eps[0], eps_high=eps[1]), want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 19)], ids=str)
@pytest.mark.parametrize("eps", [(0.2, 0.28), (1.0, 4.0)], ids=str)
def test_cispo_loss_matches_the_closed_form(eps, shape, dtype):
    for seed in range(5):
        inputs, _ = surrogate_inputs(seed, *shape, dtype=dtype, spread=1.0)
        want = each_token(lambda lp, mu, a: slow.cispo_loss(lp, mu, a, *eps), inputs)
        assert_matches(loss_and_slope(cispo_loss, inputs, eps_low=eps[0], eps_high=eps[1]), want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (5, 19)], ids=str)
@pytest.mark.parametrize("eps", [(0.2, 0.28), (1.0, 9.0)], ids=str)
def test_minpro_loss_matches_the_closed_form(eps, shape, mask_dtype, dtype):
    for seed in range(5):
        inputs, mask = surrogate_inputs(seed, *shape, dtype=dtype)
        inputs = {name: spoil(value, mask, seed) for name, value in inputs.items()}
        rows = zip(*[inputs[k].double().tolist() for k in inputs], mask.tolist(), strict=True)
        pairs = torch.tensor([slow.minpro_loss(*row, *eps) for row in rows])
        got = loss_and_slope(minpro_loss, inputs, mask.to(mask_dtype), eps_low=eps[0], eps_high=eps[1])
        assert_matches(got, (pairs[..., 0], pairs[..., 1]))


def one_token(function, rho, advantage, *args, log_prob=-1.0, **kwargs):
    inputs = {"log_prob": log_prob, "rollout_log_prob": log_prob - math.log(rho), "advantages": advantage}
    inputs = {k: torch.tensor([[v]], dtype=torch.float64) for k, v in inputs.items()}
    loss, slope = loss_and_slope(function, inputs, *args, **kwargs)
    return loss.item(), slope.item()


HALF = torch.tensor([[0.5]])
ONE = torch.tensor([[1]])
BY_HAND = {
    "ratio: on policy": (ratio_loss, 1.0, 2.0, ONE, {}, -2.0, -2.0),
    "ratio: value and slope are -rho A": (ratio_loss, 1.5, 2.0, ONE, {}, -3.0, -3.0),
    "ratio: negative advantage": (ratio_loss, 1.5, -2.0, ONE, {}, 3.0, 3.0),
    "ratio: a soft gate scales both": (ratio_loss, 1.5, 2.0, HALF, {}, -1.5, -1.5),
    "ratio: the default cap is 20, the slope stays": (ratio_loss, 30.0, 1.0, ONE, {}, -20.0, -20.0),
    "ratio: the cap holds for A < 0 too": (ratio_loss, 30.0, -1.0, ONE, {}, 20.0, 20.0),
    "ratio: another cap": (ratio_loss, 3.0, 1.0, ONE, {"ratio_cap": 2.0}, -2.0, -2.0),
    "ratio: no cap": (ratio_loss, 30.0, 1.0, ONE, {"ratio_cap": None}, -30.0, -30.0),
    "ratio: no cap, log rho clamped at 20": (
        ratio_loss,
        math.exp(25),
        1.0,
        ONE,
        {"ratio_cap": None},
        -math.exp(20),
        -math.exp(20),
    ),
    "ratio: log rho clamped at -20": (ratio_loss, math.exp(-30), 1.0, ONE, {}, -math.exp(-20), -math.exp(-20)),
    "ratio: closed gate": (ratio_loss, 1.5, 2.0, 0 * ONE, {}, 0.0, 0.0),
    "clip: on policy": (clip_loss, 1.0, 2.0, None, EPS, -2.0, -2.0),
    "clip: inside": (clip_loss, 1.1, 1.0, None, EPS, -1.1, -1.1),
    "clip: A > 0 above 1 + eps_high": (clip_loss, 1.5, 1.0, None, EPS, -1.28, 0.0),
    "clip: A > 0 between 1 + eps_low and 1 + eps_high": (clip_loss, 1.25, 1.0, None, EPS, -1.25, -1.25),
    "clip: A > 0 below 1 - eps_low is open": (clip_loss, 0.5, 1.0, None, EPS, -0.5, -0.5),
    "clip: A < 0 below 1 - eps_low": (clip_loss, 0.5, -1.0, None, EPS, 0.8, 0.0),
    "clip: A < 0 above 1 + eps_high is open": (clip_loss, 1.5, -1.0, None, EPS, 1.5, 1.5),
    "clip: no dual clip": (clip_loss, 50.0, -1.0, None, EPS, 50.0, 50.0),
    "clip: A = 0": (clip_loss, 1.5, 0.0, None, EPS, 0.0, 0.0),
    "cispo: inside": (cispo_loss, 2.0, 1.0, None, {"eps_low": 1.0, "eps_high": 4.0}, 2.0, -2.0),
    "cispo: above keeps a slope": (cispo_loss, 10.0, 1.0, None, {"eps_low": 1.0, "eps_high": 4.0}, 5.0, -5.0),
    "cispo: below keeps a slope": (cispo_loss, 0.5, -1.0, None, EPS, -0.8, 0.8),
    "minpro: the first token has prefix 1": (minpro_loss, 1.25, 1.0, ONE, EPS, 1.25, -1.25),
}


@pytest.mark.parametrize(
    ("function", "rho", "advantage", "gate", "options", "loss", "slope"), BY_HAND.values(), ids=BY_HAND.keys()
)
def test_losses_by_hand(function, rho, advantage, gate, options, loss, slope):
    args = () if gate is None else (gate,)
    assert one_token(function, rho, advantage, *args, **options) == pytest.approx((loss, slope), rel=2e-5, abs=1e-12)


MINPRO = {  # rho, mask, weights with a wide clip
    "the prefix is the minimum of what came before": ([2.0, 0.5, 1.0, 4.0], [1, 1, 1, 1], [2.0, 1.0, 0.5, 2.0]),
    "the prefix of the second token is the first, not min(1, first)": ([3.0, 2.0], [1, 1], [3.0, 6.0]),
    "the prefix excludes the token itself": ([2.0, 0.25], [1, 1], [2.0, 0.5]),
    "holes are skipped": ([2.0, 0.25, 1.5, 1.0], [1, 0, 1, 1], [2.0, 0.0, 3.0, 1.5]),
    "the first valid token has prefix 1": ([0.25, 2.0, 1.0], [0, 1, 1], [0.0, 2.0, 2.0]),
}


@pytest.mark.parametrize(("rho", "mask", "weights"), MINPRO.values(), ids=MINPRO.keys())
def test_minpro_weights_by_hand(rho, mask, weights):
    log_prob = torch.full((1, len(rho)), -1.0)
    inputs = {
        "log_prob": log_prob,
        "rollout_log_prob": log_prob - torch.tensor([rho]).log(),
        "advantages": torch.ones_like(log_prob),
    }
    _, slope = loss_and_slope(minpro_loss, inputs, torch.tensor([mask]), eps_low=1.0, eps_high=9.0)
    assert slope.tolist()[0] == pytest.approx([-w for w in weights], rel=1e-5)


def test_minpro_rows_do_not_share_a_prefix():
    log_prob = torch.full((2, 2), -1.0)
    rho = torch.tensor([[0.25, 1.0], [1.0, 1.0]])
    inputs = {"log_prob": log_prob, "rollout_log_prob": log_prob - rho.log(), "advantages": torch.ones(2, 2)}
    _, slope = loss_and_slope(minpro_loss, inputs, torch.ones(2, 2), eps_low=1.0, eps_high=9.0)
    torch.testing.assert_close(slope, torch.tensor([[-0.25, -0.25], [-1.0, -1.0]]))


def calls(inputs, mask):
    """The four losses on the same inputs, as functions of a dict of tensors."""
    return {
        "ratio": lambda x: ratio_loss(x["log_prob"], x["rollout_log_prob"], x["advantages"], x["mask"]),
        "clip": lambda x: clip_loss(x["log_prob"], x["rollout_log_prob"], x["advantages"], **EPS),
        "cispo": lambda x: cispo_loss(x["log_prob"], x["rollout_log_prob"], x["advantages"], **EPS),
        "minpro": lambda x: minpro_loss(x["log_prob"], x["rollout_log_prob"], x["advantages"], x["mask"], **EPS),
    }, {**inputs, "mask": mask.float()}


NAMES = ("ratio", "clip", "cispo", "minpro")


@pytest.mark.parametrize("name", NAMES)
def test_gradient_flows_to_log_prob_only(name):
    functions, inputs = calls(*surrogate_inputs(0))
    leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
    functions[name](leaves).sum().backward()
    assert leaves["log_prob"].grad.abs().sum() > 0
    for key in ("rollout_log_prob", "advantages", "mask"):
        assert leaves[key].grad is None or leaves[key].grad.eq(0).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_losses_accept_numbers_that_need_no_gradient(name):
    functions, inputs = calls(*surrogate_inputs(0))
    assert not functions[name](inputs).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_depends_on_its_own_log_prob_only(name):
    """A diagonal Jacobian: MinPRO's prefix is a constant."""
    functions, inputs = calls(*surrogate_inputs(1, 2, 6))
    jacobian = torch.autograd.functional.jacobian(
        lambda lp: functions[name]({**inputs, "log_prob": lp}).flatten(), inputs["log_prob"]
    ).reshape(12, 12)
    assert (jacobian - torch.diag(jacobian.diag())).eq(0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gap", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
def test_extreme_ratios_give_finite_losses_and_gradients(name, gap, advantage):
    rollout = torch.full((1, 4), -1e4 if gap > 0 else -0.5)
    inputs = {"log_prob": rollout + gap, "rollout_log_prob": rollout, "advantages": torch.full((1, 4), advantage)}
    functions, inputs = calls(inputs, torch.ones(1, 4))
    inputs["log_prob"].requires_grad_()
    loss = functions[name](inputs)
    (slope,) = torch.autograd.grad(loss.sum(), inputs["log_prob"])
    assert loss.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize(("gap", "rho"), [(25.0, math.exp(20)), (-25.0, math.exp(-20))])
def test_the_clamp_reaches_the_clipped_losses(gap, rho):
    pair = torch.tensor([[-40.0 + max(gap, 0)]]), torch.tensor([[-40.0 + max(-gap, 0)]])
    minus = torch.tensor([[-1.0]])
    wide = {"eps_low": 1.0, "eps_high": 1e12}
    assert clip_loss(*pair, -minus if gap < 0 else minus, **wide).item() == pytest.approx(
        math.copysign(rho, gap), rel=1e-5
    )
    weight = cispo_loss(*pair, minus, **wide).item() / pair[0].item()
    assert weight == pytest.approx(rho, rel=1e-5)


def test_the_clamp_holds_for_each_factor_of_minpro():
    rollout = torch.tensor([[-60.0, -60.0]])
    log_prob = rollout + 30.0
    loss = minpro_loss(log_prob, rollout, -torch.ones(1, 2), torch.ones(1, 2), eps_low=1.0, eps_high=1e30)
    assert (loss / log_prob)[0].tolist() == pytest.approx([math.exp(20), math.exp(40)], rel=1e-4)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["ratio", "minpro"])
@pytest.mark.parametrize("field", ["log_prob", "rollout_log_prob", "advantages"])
def test_garbage_on_padding_leaves_loss_and_gradient_zero_there(field, name, junk):
    inputs, mask = surrogate_inputs(2)
    functions, inputs = calls(inputs, mask)
    clean = functions[name](inputs)
    inputs[field] = torch.where(mask, inputs[field], junk)
    leaf = inputs["log_prob"] = inputs["log_prob"].clone().requires_grad_()
    loss = functions[name](inputs)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(loss[mask], clean[mask])
    assert loss[~mask].eq(0).all()
    assert slope[~mask].eq(0).all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["ratio", "clip", "cispo", "minpro"])
def test_a_token_that_pi_or_both_exclude_leaves_loss_and_gradient_finite(name, both):
    inputs, mask = surrogate_inputs(3)
    functions, inputs = calls(inputs, mask)
    row, column = mask.nonzero()[0].tolist()
    inputs["advantages"][1] = 0.0
    for where in ((row, column), (1, int(mask[1].nonzero()[0]))):
        inputs["log_prob"][where] = -math.inf
        if both:
            inputs["rollout_log_prob"][where] = -math.inf
    leaf = inputs["log_prob"] = inputs["log_prob"].clone().requires_grad_()
    loss = functions[name](inputs)
    (slope,) = torch.autograd.grad(loss[mask].sum(), leaf)
    assert loss[mask].isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_a_masked_token_sends_exactly_no_gradient_to_its_logits(seed):
    """The whole chain: logits -> log-probs -> mask -> loss; masked positions get 0.0, kept ones -rho A grad log pi."""
    g = generator(seed)
    logits = torch.randn(3, 12, 7, generator=g, dtype=torch.float64).requires_grad_()
    sampled = torch.randint(0, 7, (3, 12, 1), generator=g)
    log_prob = logits.log_softmax(-1).gather(-1, sampled)[..., 0]
    rollout = (log_prob + 0.3 * torch.randn(3, 12, generator=g)).detach()
    advantages = torch.tensor([1.0, -1.0, 0.5])[:, None].expand(3, 12).contiguous()
    mask, divergence = torch.ones(3, 12), 0.2 * torch.rand(3, 12, generator=g)
    budget = torch.full((3,), 0.08)
    region = cppo_mask(log_prob - rollout, advantages, divergence, mask, delta=0.15, weights=mask, delta_b=budget)
    assert not region.keep.requires_grad
    assert 5 < region.keep.sum() < 34
    loss = ratio_loss(log_prob, rollout, advantages, region.keep, ratio_cap=None)
    loss.sum().backward()
    assert logits.grad[~region.keep].eq(0).all()
    one_hot = torch.nn.functional.one_hot(sampled[..., 0], 7)
    weight = (log_prob - rollout).exp() * advantages * region.keep
    expected = -weight[..., None] * (one_hot - logits.softmax(-1))
    torch.testing.assert_close(logits.grad, expected.detach(), atol=1e-5, rtol=1e-4)
    assert loss.sum().item() == pytest.approx(-weight.sum().item(), rel=1e-5)
