"""The theory behind the mask, where every expectation is an exact sum: all responses of T tokens over V, float64.

``pytest -m theory -s`` prints how many pairs of policies were tried and how tight the bounds were. Names are those of
Section 3 and Appendix B: D_t is the exact total variation at a prefix, P_m the sum of w_t D_t up to m, W_m that of w_t,
lambda_t = T - t, xi = max |R|.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from scipy.optimize import linprog

from cppo_verl.core import cppo_mask, position_weights, realised_bounds

pytestmark = pytest.mark.theory
V, T, PAIRS = 3, 4, 1000
RESPONSES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [V^T, T]
LAMBDA = torch.arange(T - 1, -1, -1, dtype=torch.float64)


class Pair(NamedTuple):
    """mu and pi at every token of every response: ``[N, V^T, T]``; rewards in [-1, 1], ``[N, V^T]``."""

    log_mu: torch.Tensor
    log_pi: torch.Tensor
    divergence: torch.Tensor
    reward: torch.Tensor

    @property
    def ratio(self):
        return (self.log_pi - self.log_mu).exp()

    def mean(self, values):
        """Under mu, exact: ``[N]``."""
        return (self.log_mu.sum(-1).exp() * values).sum(-1)

    @property
    def surrogate(self):
        """L'_mu(pi)."""
        return self.mean(self.reward * (self.ratio - 1).sum(-1))

    @property
    def error(self):
        """Delta(mu, pi): what the surrogate leaves out."""
        return self.mean(self.reward * left_out(self.ratio))


def left_out(ratio):
    """sum_t (rho_t - 1) (1 - rho_{t+1:T}) of each response."""
    after = ratio.flip(-1).cumprod(-1).flip(-1)  # rho_t ... rho_T
    after = torch.cat([after[..., 1:], torch.ones_like(after[..., :1])], dim=-1)
    return ((ratio - 1) * (1 - after)).sum(-1)


def pairs(seed, change=None, by_position=None):
    """Random policies; pi's logits are mu's and ``change`` times a normal draw, scaled by position.

    Rewards are the worst there are: each response's has the sign of what it adds to Delta.
    """
    draw = torch.Generator().manual_seed(seed)
    change = (
        10 ** (2.5 * torch.rand(PAIRS, 1, 1, generator=draw, dtype=torch.float64) - 2) if change is None else change
    )
    columns = []
    for t in range(T):
        scale = change * (1.0 if by_position is None else by_position[t])
        logits = 1.5 * torch.randn(PAIRS, V**t, V, generator=draw, dtype=torch.float64)
        moved = logits + scale * torch.randn(PAIRS, V**t, V, generator=draw, dtype=torch.float64)
        log_mu, log_pi = logits.log_softmax(-1), moved.log_softmax(-1)
        tv = 0.5 * (log_pi.exp() - log_mu.exp()).abs().sum(-1)
        prefix = sum(RESPONSES[:, i] * V ** (t - 1 - i) for i in range(t)) if t else torch.zeros(V**T, dtype=torch.long)
        columns.append((log_mu[:, prefix, RESPONSES[:, t]], log_pi[:, prefix, RESPONSES[:, t]], tv[:, prefix]))
    log_mu, log_pi, divergence = (torch.stack(column, dim=-1) for column in zip(*columns, strict=True))
    return Pair(log_mu, log_pi, divergence, left_out((log_pi - log_mu).exp()).sign())


# Small and large changes, at the beginning, at the end, everywhere.
SHAPES = [None, (1, 1, 1, 1), (2, 1, 0.5, 0.1), (0.1, 0.5, 1, 2), (1, 0, 0, 1)]


@pytest.fixture(scope="module", params=range(len(SHAPES)))
def tried(request):
    return pairs(request.param, by_position=SHAPES[request.param])


def weights(w_min):
    return position_weights(torch.ones(1, T), w_min)[0].double()


def constraints(pair, w):
    """(lbar, delta_b): the smallest with w_t D_t <= c_t and P_m <= delta_b W_m for m < T at every prefix; ``[N]``."""
    spent, weight = (w * pair.divergence).cumsum(-1), w.cumsum(-1)
    return pair.divergence.amax((1, 2)), (spent / weight)[..., :-1].amax((1, 2))


def test_the_return_is_the_surrogate_less_delta(tried):
    """Lemma 2, to machine precision."""
    gained = (tried.log_pi.sum(-1).exp() * tried.reward).sum(-1) - tried.mean(tried.reward)
    assert (gained - (tried.surrogate - tried.error)).abs().max() < 1e-10
    assert tried.error.abs().max() > 0.01  # there is something to be bounded


@pytest.mark.parametrize("w_min", [1.0, 0.8, 0.5, 0.1])
def test_theorem_1(tried, w_min):
    """|Delta| <= 2 xi T (T - 1) lbar delta_b."""
    w = weights(w_min)
    assert ((LAMBDA / w).diff() <= 0).all()  # its condition on the weights
    lbar, delta_b = constraints(tried, w)
    bound = 2 * T * (T - 1) * lbar * delta_b
    ratio = tried.error.abs() / bound
    print(f"Theorem 1, w_min {w_min}: {len(ratio)} pairs, tightest {ratio.max():.3f}")
    assert ratio.max() <= 1 + 1e-12


def test_the_uniform_bound_and_that_theorem_1_is_no_looser(tried):
    """|Delta| <= 2 xi T (T - 1) delta^2; with w = 1 the prefix budget that a pair needs is at most its delta."""
    delta, delta_b = constraints(tried, weights(1.0))
    assert (tried.error.abs() <= 2 * T * (T - 1) * delta**2 * (1 + 1e-12)).all()
    assert (delta_b <= delta).all()


def test_the_realised_bound_is_theorem_1s_where_every_response_is_seen(tried):
    """Of all responses the largest is no bound by itself (one may have lbar, another delta_b) but never above it."""
    w = weights(0.8)
    lbar, delta_b = constraints(tried, w)
    rows = tried.divergence.flatten(0, 1)
    found = realised_bounds(rows, w.expand_as(rows), torch.ones_like(rows))
    uniform, cppo = (column.view(PAIRS, -1).amax(-1) for column in found)
    torch.testing.assert_close(uniform, 2 * T * (T - 1) * lbar**2)
    assert (cppo <= 2 * T * (T - 1) * lbar * delta_b * (1 + 1e-12)).all()
    assert (cppo > 0.5 * 2 * T * (T - 1) * lbar * delta_b).any()


def test_pairs_outside_the_constraints_exceed_the_bound():
    """The check can fail: with budgets that the pairs do not keep, some exceed what these would guarantee."""
    large = pairs(9, change=torch.tensor(0.3, dtype=torch.float64))
    lbar, delta_b = constraints(large, weights(0.8))
    delta, budget = 0.05, 0.02  # of w_t D_t, and per unit of weight
    inside = (lbar <= delta) & (delta_b <= budget)
    exceeding = large.error.abs() > 2 * T * (T - 1) * delta / 0.8 * budget
    print(f"{int(exceeding.sum())} of {PAIRS} pairs, {int(inside.sum())} of them inside")
    assert exceeding.sum() > PAIRS / 10
    assert not (exceeding & inside).any()


@pytest.mark.parametrize("w_min", [1.0, 0.8])
def test_what_the_mask_lets_through_is_within_proposition_8(tried, w_min):
    """Where the mask keeps every token in any direction, its initial slack adds at most 4 xi lbar (T-1) delta / w_1.

    The mask itself is asked for every fiftieth pair: it takes one delta a call.
    """
    w = weights(w_min)
    z = w * tried.divergence
    delta = z.amax((1, 2)) * (1 + 1e-6)  # the mask compares in float32
    over = ((z.cumsum(-1) - delta[:, None, None])[..., 1:] / w.cumsum(-1)[:-1]).amax((1, 2))
    delta_b = over.clamp_min(0) * (1 + 1e-6) + 1e-9
    log_ratio = (tried.log_pi - tried.log_mu).flatten(0, 1)
    rest = (log_ratio.sign(), tried.divergence.flatten(0, 1), torch.ones_like(log_ratio))  # nothing is corrective

    def kept(budget):
        spread = budget.repeat_interleave(V**T)
        ours = w.float().expand_as(log_ratio)
        keep = torch.empty_like(log_ratio, dtype=torch.bool).view(PAIRS, -1, T)
        for n in range(0, PAIRS, 50):
            rows = slice(n * V**T, (n + 1) * V**T)
            arguments = [column[rows] for column in (log_ratio, *rest)]
            keep[n] = cppo_mask(*arguments, delta=float(delta[n]), weights=ours[rows], delta_b=spread[rows]).keep.view(
                -1, T
            )
        return keep[::50].all(-1).all(-1)

    assert kept(delta_b).all()
    binding = over[::50] > 1e-3
    assert not kept(0.9 * delta_b)[binding].any()  # a smaller budget masks
    lbar = tried.divergence.amax((1, 2))
    bound = 2 * T * (T - 1) * lbar * delta_b + 4 * lbar * (T - 1) * delta / w[0]
    ratio = tried.error.abs() / bound
    print(
        f"Proposition 8, w_min {w_min}: {len(ratio)} pairs, tightest {ratio.max():.3f}; {int(binding.sum())} at budget"
    )
    assert ratio.max() <= 1 + 1e-9


def worst(length, w, budget, prefixes):
    """max of sum_t lambda_t D_t over D >= 0 with P_m <= budget W_m at the given m, by linear programming."""
    remaining = [length - t for t in range(1, length + 1)]
    rows = [[w[t] if t < m else 0.0 for t in range(length)] for m in prefixes]
    limits = [budget * sum(w[:m]) for m in prefixes]
    found = linprog([-value for value in remaining], A_ub=rows, b_ub=limits)
    return -found.fun


@pytest.mark.parametrize("length", [2, 5, 16, 40])
@pytest.mark.parametrize("w_min", [1.0, 0.8, 0.3])
def test_a_sequence_saturates_the_prefix_constraints(length, w_min):
    """D_t = delta_b at every token reaches delta_b T (T - 1) / 2, and nothing within the constraints exceeds it."""
    w = position_weights(torch.ones(1, length), w_min)[0].double().tolist()
    assert worst(length, w, 0.02, range(1, length)) == pytest.approx(0.02 * length * (length - 1) / 2, rel=1e-6)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_an_average_over_the_response_alone_allows_twice_as_much(length):
    """TRM-Avg's: all may be spent on the first token, delta T (T - 1), which is 2 - 2/T times delta T^2 / 2."""
    alone = worst(length, [1.0] * length, 0.02, [length])
    assert alone == pytest.approx(2 * worst(length, [1.0] * length, 0.02, range(1, length)), rel=1e-6)
    assert alone == pytest.approx((2 - 2 / length) * 0.02 * length**2 / 2, rel=1e-6)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_the_order_of_the_weights_matters(length):
    """Eq. 9's order meets Theorem 1's condition; with the last weight second, the same weights leave more room."""
    linear = position_weights(torch.ones(1, length), 0.3)[0].double().tolist()
    moved = [linear[0], linear[-1], *linear[1:-1]]
    remaining = [length - t for t in range(1, length + 1)]
    assert remaining[1] / moved[1] > remaining[0] / moved[0]
    limit = worst(length, linear, 0.02, range(1, length))
    assert worst(length, moved, 0.02, range(1, length)) > 1.01 * limit
