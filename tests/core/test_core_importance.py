"""The factors of the methods beyond Table 1: float64 loops written from their formulas, gradients of their objectives,
cases by hand."""

import math

import pytest
import torch

from cppo_verl import core

KINDS = {
    "drpo": {"delta": 0.3},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gspo": {"eps_low": 0.01, "eps_high": 0.015},
    "gmpo": {"eps_low": 0.4, "eps_high": 0.3},
    "aspo": {"eps_low": 0.2, "eps_high": 0.25, "cap_pos": 2.0, "cap_neg": 1.5},
    "fipo": {
        **{"eps_low": 0.2, "eps_high": 0.28, "half_life": 3.0, "low": 0.9, "high": 1.2},
        **{"safety": 1.1, "dual_clip": 2.5},
    },
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
}


def batch(seed, rows=24, columns=20):
    """log pi, log mu, advantages (one sign a response, some 0), mask with holes; float32."""
    draw = torch.Generator().manual_seed(seed)
    log_mu = -0.05 - 2 * torch.rand(rows, columns, generator=draw)
    spread = torch.logspace(-3, 0.2, rows)[:, None]
    log_pi = (log_mu + spread * torch.randn(rows, columns, generator=draw)).clamp_max(-1e-3)
    advantages = torch.randn(rows, 1, generator=draw).expand(rows, columns).clone()
    advantages[::7] = 0.0
    mask = torch.rand(rows, columns, generator=draw) < 0.8
    mask[3] = False
    return log_pi, log_mu, advantages, mask


def factor(name, log_pi, log_mu, advantages, mask):
    divergence = (core.binary_tv(log_pi, log_mu),) if name == "drpo" else ()
    return getattr(core, name)(log_pi - log_mu, advantages, *divergence, mask, **KINDS[name])


def slow(name, log_pi, log_mu, advantage):
    """Weights of one response's valid tokens, Python floats."""
    s = KINDS[name]
    x = [a - b for a, b in zip(log_pi, log_mu, strict=True)]
    rho = [math.exp(value) for value in x]
    sign = (advantage > 0) - (advantage < 0)
    n = len(x)
    if name == "drpo":
        gaps = [math.exp(a) - math.exp(b) for a, b in zip(log_pi, log_mu, strict=True)]
        return [r * (1 - sign * gap / s["delta"]) for r, gap in zip(rho, gaps, strict=True)]
    if name == "sapo":
        tau = s["tau_pos"] if sign > 0 else s["tau_neg"]
        return [r / math.cosh(tau * (r - 1) / 2) ** 2 for r in rho]
    if name == "gspo":
        mean = math.exp(sum(x) / n)
        out = (sign > 0 and mean > 1 + s["eps_high"]) or (sign < 0 and mean < 1 - s["eps_low"])
        return [0.0 if out else mean] * n
    if name == "gmpo":
        cut = [min(v, s["eps_high"]) if sign > 0 else max(v, -s["eps_low"]) if sign < 0 else 0.0 for v in x]
        mean = math.exp(sum(cut) / n)
        out = [(sign > 0 and v > s["eps_high"]) or (sign < 0 and v < -s["eps_low"]) for v in x]
        return [0.0 if o else mean for o in out]
    if name == "vespo":
        log_w = max(-20.0, min(20.0, sum(x)))
        k, lam = (s["k_pos"], s["lambda_pos"]) if sign >= 0 else (s["k_neg"], s["lambda_neg"])
        return [math.exp(k * log_w + lam * (1 - math.exp(log_w)))] * n
    ppo = [(sign > 0 and r > 1 + s["eps_high"]) or (sign < 0 and r < 1 - s["eps_low"]) for r in rho]
    if name == "aspo":
        w = [min(1 / r, s["cap_pos"]) if sign > 0 else min(r, s["cap_neg"]) for r in rho]
        return [0.0 if o else v for o, v in zip(ppo, w, strict=True)]
    assert name == "fipo"
    gamma, weights = 2 ** (-1 / s["half_life"]), []
    beyond = [sign < 0 and r > s["dual_clip"] for r in rho]
    for t in range(n):
        future = sum(gamma ** (k - t) * x[k] for k in range(t, n) if rho[k] <= s["dual_clip"])
        f = max(s["low"], min(s["high"], math.exp(future)))
        if sign < 0 and rho[t] > s["safety"]:
            f = max(0.8, min(1.0, f))
        weights.append(0.0 if ppo[t] or beyond[t] or sum(beyond) > 1 else f * rho[t])
    return weights


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KINDS)
def test_as_the_loop(name, seed):
    log_pi, log_mu, advantages, mask = batch(seed)
    spoilt = [values.masked_fill(~mask, torch.nan) for values in (log_pi, log_mu)]
    found = factor(name, *spoilt, advantages, mask)
    for row in range(len(mask)):
        inside = mask[row]
        if not inside.any():
            assert not found.weight[row].any()
            continue
        want = slow(name, log_pi.double()[row][inside].tolist(), log_mu.double()[row][inside].tolist(),
                    advantages[row, 0].item())  # fmt: skip
        torch.testing.assert_close(
            found.weight[row][inside], torch.tensor(want, dtype=torch.float32), rtol=2e-5, atol=2e-6
        )
    for values in filter(torch.is_tensor, found):
        assert not values[~mask].any()
    if name in ("gspo", "gmpo", "aspo", "fipo"):
        assert 0 < (found.gate[mask] == 0).sum() < mask.sum()
        assert torch.equal((found.weight == 0)[mask], (found.gate == 0)[mask])


def objective(name, log_pi, log_mu, a):
    """Of one response, differentiable: the papers' own, whose gradient the factor has to be."""
    s, rho = KINDS[name], (log_pi - log_mu).exp()
    if name == "drpo":
        return (a * rho - abs(a) * log_mu.exp() * (rho - 1) ** 2 / (2 * s["delta"])).sum()
    if name == "sapo":
        tau = s["tau_pos"] if a > 0 else s["tau_neg"]
        return (a * 4 / tau * torch.sigmoid(tau * (rho - 1))).sum()
    if name == "gspo":  # times the length: the paper's weight of a token is 1/|y|
        mean = (log_pi - log_mu).mean().exp()
        return len(rho) * torch.minimum(a * mean, a * mean.clamp(1 - s["eps_low"], 1 + s["eps_high"]))
    if name == "gmpo":
        x = log_pi - log_mu
        cut = x.clamp_max(s["eps_high"]) if a > 0 else x.clamp_min(-s["eps_low"])
        return len(rho) * a * cut.mean().exp()
    if name == "aspo":
        clipped = rho.clamp_max(1 + s["eps_high"]) if a > 0 else rho.clamp_min(1 - s["eps_low"])
        if a > 0:
            ours = a * clipped / clipped.detach() ** 2
            return torch.where(1 / clipped <= s["cap_pos"], ours, a * s["cap_pos"] * log_pi).sum()
        return torch.where(clipped <= s["cap_neg"], a * clipped, a * s["cap_neg"] * log_pi).sum()
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["drpo", "sapo", "gspo", "gmpo", "aspo"])
def test_it_is_the_gradient_of_the_papers_objective(name):
    log_pi, log_mu, advantages, mask = (
        values.double() if values.is_floating_point() else values for values in batch(7)
    )
    found = factor(name, log_pi, log_mu, advantages, mask)
    checked = 0
    for row in range(len(mask)):
        inside, a = mask[row], advantages[row, 0].item()
        if not inside.any() or a == 0:
            continue
        leaf = log_pi[row][inside].clone().requires_grad_()
        objective(name, leaf, log_mu[row][inside], a).backward()
        torch.testing.assert_close(leaf.grad, found.weight[row][inside].double() * a, rtol=2e-5, atol=2e-6)
        checked += 1
    assert checked > 15


def test_a_weighted_loss_has_that_value_and_gradient():
    log_pi, _, advantages, mask = batch(1)
    weight = torch.where(mask, torch.rand(mask.shape), 0.0)
    leaf = log_pi.masked_fill(~mask, -torch.inf).requires_grad_()
    loss = core.weighted_loss(leaf, advantages.masked_fill(~mask, torch.nan), weight)
    loss.sum().backward()
    want = torch.where(mask, -weight * advantages, 0.0)
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(leaf.grad, want)


def test_drpo_pulls_back_beyond_delta_by_hand():
    mu, pi = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.6, 0.8, 0.4, 0.5]])
    found = core.drpo((pi / mu).log(), torch.ones(1, 4), (pi - mu).abs(), torch.ones(1, 4), delta=0.2)
    assert found.gate[0].tolist() == pytest.approx([0.5, -0.5, 1.5, 1.0], abs=1e-6)
    assert found.weight[0].tolist() == pytest.approx([0.6, -0.8, 1.2, 1.0], abs=1e-6)
    down = core.drpo((pi / mu).log(), -torch.ones(1, 4), (pi - mu).abs(), torch.ones(1, 4), delta=0.2)
    assert down.gate[0].tolist() == pytest.approx([1.5, 2.5, 0.5, 1.0], abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_truncation_and_bands(level):
    log_pi, log_mu, _, mask = batch(5)
    log_mu[::2] -= 0.05  # some responses have become likelier
    x = (log_pi - log_mu).double()
    k = x.exp()
    if level != "token":
        sums = (x * mask).sum(-1, keepdim=True)
        k = (sums if level == "sequence" else sums / mask.sum(-1, keepdim=True).clamp_min(1)).exp().expand_as(x)
    found = core.truncated(log_pi - log_mu, mask, level=level, cap=1.02)
    torch.testing.assert_close(found.weight.double(), (k.clamp_max(1.02) * mask), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.clipped, mask & (k > 1.02))
    assert found.clipped.any()
    inside = mask & (k >= 0.98) & (k <= 1.02)
    for weighted in (True, False):
        band = core.banded(log_pi - log_mu, mask, level=level, low=0.98, high=1.02, weighted=weighted)
        torch.testing.assert_close(
            band.weight.double(), (k if weighted else torch.ones_like(k)) * inside, rtol=1e-5, atol=1e-6
        )
        assert torch.equal(band.gate > 0, inside)
        assert 0 < inside.sum() < mask.sum()
    with pytest.raises(ValueError, match="level must be one of token, sequence, geometric"):
        core.truncated(log_pi, mask, level="group", cap=2.0)


def removed_one_by_one(x, away, tau):
    """Algorithm 1: the largest goes while the mean of what is left exceeds tau."""
    left = {place for place, flag in enumerate(away) if flag}
    while left and sum(x[place] ** 2 for place in left) / len(left) > tau:
        left.remove(max(left, key=lambda place: x[place] ** 2))
    return left


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("tau", [1e-7, 0.005, 0.04, 10.0])
def test_m2po_is_algorithm_1(joint, tau):
    log_pi, log_mu, advantages, mask = batch(11)
    x = log_pi - log_mu
    keep = core.m2po_mask(x, advantages, mask, tau=tau, joint=joint)
    away = mask & (advantages.sign() * x.sign() > 0)
    columns = [(x.double().flatten(), away.flatten(), mask.flatten(), keep.flatten())]
    if not joint:
        columns = list(zip(x.double(), away, mask, keep, strict=True))
    for values, moving, valid, kept in columns:
        left = removed_one_by_one(values.tolist(), moving.tolist(), tau)
        want = [bool(v) and (not m or place in left) for place, (v, m) in
                enumerate(zip(valid, moving, strict=True))]  # fmt: skip
        assert kept.tolist() == want
    if tau == 0.04:
        assert 0 < (mask & ~keep).sum() < away.sum()


def test_opsm_by_hand():
    """Of the responses with A < 0 those whose mean of log mu - log pi is above delta."""
    x = torch.tensor([[-0.5, -0.1, 9.0], [-0.5, -0.1, 9.0], [-0.5, 0.3, 9.0], [0.5, 0.5, 9.0]])
    mask = torch.tensor([[1, 1, 0]] * 4)
    advantages = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0]]).expand(4, 3)
    keep = core.opsm_mask(x, advantages, mask, delta=0.2)
    assert keep.tolist() == [[False] * 3, [True, True, False], [True, True, False], [True, True, False]]


def test_the_discounted_future_of_a_long_response():
    """Longer than a chunk, with holes, against the recursion F_t = x_t + gamma F_{t+1}."""
    from cppo_verl.core.importance import _discounted_future

    draw = torch.Generator().manual_seed(0)
    values, mask = torch.randn(3, 1000, generator=draw), torch.rand(3, 1000, generator=draw) < 0.7
    found = _discounted_future(values, mask, 0.98)
    for row in range(3):
        after = 0.0
        for t in reversed(range(1000)):
            if mask[row, t]:
                after = values[row, t].item() + 0.98 * after
                assert found[row, t].item() == pytest.approx(after, abs=1e-9)
            else:
                assert found[row, t] == 0


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_independent_and_padding_changes_nothing(name):
    log_pi, log_mu, advantages, mask = batch(2)
    whole = factor(name, log_pi, log_mu, advantages, mask)
    one = factor(
        name, *[torch.nn.functional.pad(values[5:6], (0, 40)) for values in (log_pi, log_mu, advantages, mask)]
    )
    for first, second in zip(whole, one, strict=True):
        if first is None:
            continue
        torch.testing.assert_close(first[5:6], second[:, :20])
        assert not second[:, 20:].any()


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="advantages has shape"):
        core.gspo(x, torch.zeros(2, 1), torch.ones(2, 3), eps_low=0.1, eps_high=0.1)
    with pytest.raises(ValueError, match="delta must be > 0"):
        core.drpo(x, x, x, torch.ones(2, 3), delta=0.0)
    with pytest.raises(ValueError, match="tau must be > 0"):
        core.m2po_mask(x, x, torch.ones(2, 3), tau=-1.0, joint=True)


def test_a_weight_of_fipo_is_cut_only_where_a_bound_changed_it():
    """log rho = 0 everywhere: F = 0 and f = 1, which is low and high here, but nothing was changed."""
    zeros, mask = torch.zeros(1, 4), torch.ones(1, 4).bool()
    settings = KINDS["fipo"] | {"low": 1.0, "high": 1.0}
    assert not core.fipo(zeros, zeros + 1, mask, **settings).clipped.any()
    assert core.fipo(zeros + 0.05, zeros + 1, mask, **settings).clipped.all()
