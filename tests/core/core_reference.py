"""Slow references for `cppo_verl.core`, written from the specification alone.

Plain Python floats (float64), one row or one token at a time, walking the definitions of the paper in reading order.
Nothing here is shaped like tensor code, so that an indexing mistake cannot be made twice in the same way.
"""

import math
from typing import NamedTuple


class Decision(NamedTuple):
    keep: bool
    token_exceeded: bool
    prefix_exceeded: bool
    threshold: float
    margin: float  # distance to the nearest comparison; float32 may decide differently only where this is tiny


PADDING = Decision(False, False, False, 0.0, math.inf)


def position_weights(mask, w_min):
    """Eq. 9 for one row."""
    total = 0
    for valid in mask:
        if valid:
            total += 1
    weights, t = [], 0
    for valid in mask:
        if not valid:
            weights.append(0.0)
            continue
        t += 1
        weights.append(1.0 if total == 1 else 1.0 - (1.0 - w_min) / (total - 1) * (t - 1))
    return weights


def linear_quantile(values, q):
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    part = rank - below
    if part == 0.0 or below + 1 == len(ordered):
        return ordered[below]
    return ordered[below] * (1.0 - part) + ordered[below + 1] * part


def prefix_budget(divergence, mask, delta_b, quantile, max_factor):
    """Eq. 22 for one row."""
    own = [d for d, valid in zip(divergence, mask, strict=True) if valid]
    if quantile is None or not own:
        return delta_b
    p = linear_quantile(own, quantile)
    if p < delta_b:
        return delta_b
    if p > max_factor * delta_b:
        return max_factor * delta_b
    return p


def moves_away(log_ratio, advantage):
    """The negation of A (rho - 1) <= 0, by cases."""
    if advantage > 0:
        return log_ratio > 0
    if advantage < 0:
        return log_ratio < 0
    return False


def cppo_mask(log_ratio, advantages, divergence, mask, *, delta, weights, delta_b):
    """Eq. 8-10 for one row; delta_b is a number, or None for no budget."""
    spent, earned = 0.0, 0.0  # S_{t-1}, W_{t-1}
    decisions = []
    for r, a, d, valid, w in zip(log_ratio, advantages, divergence, mask, weights, strict=True):
        if not valid:
            decisions.append(PADDING)
            continue
        z = w * d
        if delta_b is None:
            c, prefix = delta, False
        else:
            c = min(delta, delta + delta_b * earned - spent)
            prefix = spent + z > delta + delta_b * earned
        keep = z <= c if moves_away(r, a) else True
        decisions.append(Decision(keep, z > delta, prefix, c, min(abs(z - delta), abs(z - c))))
        spent += z
        earned += w
    return decisions


def dppo_mask(log_ratio, advantages, divergence, mask, *, delta):
    decisions = []
    for r, a, d, valid in zip(log_ratio, advantages, divergence, mask, strict=True):
        if valid:
            keep = (not moves_away(r, a)) or d <= delta
            decisions.append(Decision(keep, d > delta, False, delta, abs(d - delta)))
        else:
            decisions.append(PADDING)
    return decisions


def trm_mask(divergence, mask, *, delta_max, delta_avg):
    own = [d for d, valid in zip(divergence, mask, strict=True) if valid]
    if not own:
        return [PADDING] * len(mask)
    mean = math.fsum(own) / len(own)
    too_high = delta_max is not None and max(own) > delta_max
    too_much = delta_avg is not None and mean > delta_avg
    margin = math.inf if delta_avg is None else abs(mean - delta_avg)
    threshold = delta_avg if delta_max is None else delta_max
    decisions = []
    for d, valid in zip(divergence, mask, strict=True):
        if not valid:
            decisions.append(PADDING)
            continue
        token = delta_max is not None and d > delta_max
        decisions.append(Decision(not too_high and not too_much, token, too_much, threshold, margin))
    return decisions


def soft_gate(log_ratio, advantages, divergence, mask, *, delta, weights, delta_b):
    """Eq. 19-20 for one row: pairs (gate, x)."""
    spent, earned = 0.0, 0.0
    gates = []
    for r, a, d, valid, w in zip(log_ratio, advantages, divergence, mask, weights, strict=True):
        if not valid:
            gates.append((0.0, 0.0))
            continue
        spent += w * d  # S_t includes token t
        x = w * d / delta
        if delta_b is not None:
            x = max(x, spent / (delta + delta_b * earned))
        earned += w
        gates.append((1.0 if x <= 1.0 or not moves_away(r, a) else 1.0 / x, x))
    return gates


# --- divergences: a list of cells (mu(cell), pi(cell)), then one formula over cells


def tv_of_cells(cells):
    return 0.5 * math.fsum(abs(mu - pi) for mu, pi in cells)


def kl_of_cells(cells):
    terms = []
    for mu, pi in cells:
        if mu > 0.0:
            terms.append(mu * math.log(mu / pi) if pi > 0.0 else math.inf)
    return math.fsum(terms)


def binary_cells(log_prob, rollout_log_prob):
    mu, pi = math.exp(rollout_log_prob), math.exp(log_prob)
    rest_mu, rest_pi = -math.expm1(rollout_log_prob), -math.expm1(log_prob)
    return [(mu, pi), (rest_mu, rest_pi)]


def vocabulary_cells(mu, pi, ids, sampled):
    """The partition of Section 2.3 out of two full distributions: each id of the vocabulary is put in its own cell."""
    total = {}
    for token in range(len(mu)):
        cell = token if token in ids or token == sampled else "other"
        old = total.get(cell, (0.0, 0.0))
        total[cell] = (old[0] + mu[token], old[1] + pi[token])
    return list(total.values())


def full_cells(mu, pi):
    return list(zip(mu, pi, strict=True))


def softmax(logits):
    top = max(logits)
    raw = [math.exp(x - top) for x in logits]
    total = math.fsum(raw)
    return [x / total for x in raw]


def k3(log_ratio):
    return math.expm1(log_ratio) - log_ratio


# --- surrogates: (loss, d loss / d log pi) of one token


def clamped_ratio(log_prob, rollout_log_prob):
    gap = log_prob - rollout_log_prob
    return math.exp(20.0 if gap > 20.0 else -20.0 if gap < -20.0 else gap)


def between(value, low, high):
    return low if value < low else high if value > high else value


def ratio_loss(log_prob, rollout_log_prob, advantage, gate, ratio_cap):
    weight = clamped_ratio(log_prob, rollout_log_prob)
    if ratio_cap is not None and weight > ratio_cap:
        weight = ratio_cap
    loss = -float(gate) * weight * advantage
    return loss, loss  # the slope of rho is rho; a capped weight is a constant times the slope of log pi


def clip_loss(log_prob, rollout_log_prob, advantage, eps_low, eps_high):
    rho = clamped_ratio(log_prob, rollout_log_prob)
    if advantage > 0 and rho > 1 + eps_high:
        return -(1 + eps_high) * advantage, 0.0
    if advantage < 0 and rho < 1 - eps_low:
        return -(1 - eps_low) * advantage, 0.0
    return -rho * advantage, -rho * advantage


def cispo_loss(log_prob, rollout_log_prob, advantage, eps_low, eps_high):
    weight = between(clamped_ratio(log_prob, rollout_log_prob), 1 - eps_low, 1 + eps_high)
    return -weight * advantage * log_prob, -weight * advantage


def minpro_loss(log_prob, rollout_log_prob, advantages, mask, eps_low, eps_high):
    """One row: the list of (loss, slope)."""
    seen, out = [], []
    for lp, mu, a, valid in zip(log_prob, rollout_log_prob, advantages, mask, strict=True):
        if not valid:
            out.append((0.0, 0.0))
            continue
        rho = clamped_ratio(lp, mu)
        weight = between((min(seen) if seen else 1.0) * rho, 1 - eps_low, 1 + eps_high)
        out.append((-weight * a * lp, -weight * a))
        seen.append(rho)
    return out
