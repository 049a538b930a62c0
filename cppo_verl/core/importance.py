"""The factor on A_t grad log pi(y_t) of the methods beyond Table 1, float32 ``[B, T]`` without gradient, 0 on padding.

Sources and where they differ: docs/methods. rho_t = pi / mu of the sampled token, its logarithm clamped to +-20; "the
mean" and "the sum" of a response are over its valid tokens. ``weighted_loss`` makes a loss of a factor.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cppo_verl.core.checks import require_positive, require_same_shape
from cppo_verl.core.surrogate import LOG_RATIO_BOUND, ppo_clipped

LEVELS = ("token", "sequence", "geometric")
# Columns of one matrix product in the discounted sums of FIPO.
_CHUNK = 256


class Factor(NamedTuple):
    """What a rule makes of each token's gradient; all ``[B, T]``."""

    weight: Tensor
    """float32: factor on A_t grad log pi(y_t)."""
    gate: Tensor
    """float32: the part of it that the rule adds to a plain importance weight; 0 where the token is masked."""
    clipped: Tensor | None = None
    """bool: the weight was cut to a bound and the token keeps a gradient; None for a rule that cuts none."""


@torch.no_grad()
def drpo(log_ratio: Tensor, advantages: Tensor, divergence: Tensor, response_mask: Tensor, *, delta: float) -> Factor:
    """DRPO (arXiv 2606.09821): ``rho_t (1 - sign(A_t (rho_t - 1)) D_t / delta)``.

    Over D_t = |pi - mu| (binary TV) the gradient of ``A rho - |A| mu (rho - 1)^2 / (2 delta)``. Beyond delta the factor
    is negative: the token is pulled back. ``gate`` is the bracket.
    """
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages, divergence=divergence)
    require_positive("delta", delta)
    away = torch.sign(advantages.float()) * torch.sign(x)
    gate = torch.where(valid, 1.0 - away * divergence.float().masked_fill(~valid, 0.0) / delta, 0.0)
    return Factor(x.exp() * gate, gate)


@torch.no_grad()
def sapo(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, *, tau_pos: float, tau_neg: float) -> Factor:
    """SAPO (arXiv 2511.20347): ``rho_t sech^2(tau (rho_t - 1) / 2)``, tau by the sign of A_t."""
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    require_positive("tau_pos", tau_pos)
    require_positive("tau_neg", tau_neg)
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    sigma = torch.sigmoid(tau * (x.exp() - 1.0))
    gate = torch.where(valid, 4.0 * sigma * (1.0 - sigma), 0.0)
    return Factor(x.exp() * gate, gate)


@torch.no_grad()
def gspo(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, *, eps_low: float, eps_high: float) -> Factor:
    """GSPO (arXiv 2507.18071): s = exp(mean log rho) on every token, 0 where ``min(s A, clip(s) A)`` takes the clip."""
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    s = _mean(x, valid).exp().expand_as(x)
    keep = valid & ~ppo_clipped(s, advantages, 1.0 - eps_low, 1.0 + eps_high)
    return Factor(s * keep, keep.float())


@torch.no_grad()
def gmpo(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, *, eps_low: float, eps_high: float) -> Factor:
    """GMPO (arXiv 2507.20673): the geometric mean of clipped ratios; a clipped token has gradient 0 and stays in it.

    The bounds are of log rho: above eps_high for A > 0, below -eps_low for A < 0.
    """
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    cut = torch.where(advantages > 0, x.clamp_max(eps_high), x.clamp_min(-eps_low)).masked_fill(~valid, 0.0)
    cut = torch.where(advantages == 0, 0.0, cut)
    s = _mean(cut, valid).exp().expand_as(x)
    keep = valid & ~(((advantages > 0) & (x > eps_high)) | ((advantages < 0) & (x < -eps_low)))
    return Factor(s * keep, keep.float())


@torch.no_grad()
def truncated(log_ratio: Tensor, response_mask: Tensor, *, level: str, cap: float) -> Factor:
    """TIS: ``min(k, cap)`` with k the ratio of the token, or the response's product or geometric mean (``level``)."""
    valid, x = _prepared(log_ratio, response_mask)
    require_positive("cap", cap)
    k = _ratio(x, valid, level)
    weight = torch.where(valid, k.clamp_max(cap), 0.0)
    return Factor(weight, valid.float(), valid & (k > cap))


@torch.no_grad()
def banded(
    log_ratio: Tensor, response_mask: Tensor, *, level: str, low: float, high: float, weighted: bool = True
) -> Factor:
    """MIS and IcePop: ``k`` where ``low <= k <= high``, else 0; k as in :func:`truncated`.

    Args:
        weighted: False keeps the selection alone (rejection sampling): 1 instead of k.
    """
    valid, x = _prepared(log_ratio, response_mask)
    k = _ratio(x, valid, level)
    keep = valid & (k >= low) & (k <= high)
    return Factor(torch.where(keep, k if weighted else torch.ones_like(k), 0.0), keep.float())


@torch.no_grad()
def m2po_mask(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, *, tau: float, joint: bool) -> Tensor:
    """M2PO (arXiv 2510.01161), Algorithm 1: which tokens stay, bool ``[B, T]``.

    Of the tokens that move away (A > 0 and rho > 1, A < 0 and rho < 1) those with the largest log(rho)^2 are masked
    until the mean of the rest is at most tau.

    Args:
        joint: over all rows together; else over each response by itself.
    """
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    require_positive("tau", tau)
    away = valid & (torch.sign(advantages.float()) * torch.sign(x) > 0)
    moment = torch.where(away, x.double().square(), torch.inf)
    rows = moment.reshape(1, -1) if joint else moment
    ordered, places = rows.sort(dim=-1, stable=True)
    counted = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    # Means of the j smallest do not fall with j: as many are kept as have a mean within tau.
    within = (ordered.cumsum(-1) / counted) <= tau
    stays = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, places, within).view_as(valid)
    return valid & (~away | stays)


@torch.no_grad()
def opsm_mask(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, *, delta: float) -> Tensor:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556): which tokens stay, bool ``[B, T]``.

    A token with A < 0 is masked where its response's mean of log mu - log pi exceeds delta.
    """
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    return valid & ~((advantages < 0) & (-_mean(x, valid) > delta))


@torch.no_grad()
def aspo(
    log_ratio: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    cap_pos: float,
    cap_neg: float,
) -> Factor:
    """ASPO (arXiv 2510.06062): 1/rho where A > 0, rho where A < 0, cut to ``cap_*``; 0 where PPO's clip takes it.

    ``gate`` is 0 where rho > 1 + eps_high (A > 0) or rho < 1 - eps_low (A < 0); a token at a cap keeps its gradient.
    """
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    keep = valid & ~ppo_clipped(x.exp(), advantages, 1.0 - eps_low, 1.0 + eps_high)
    w = torch.where(advantages > 0, -x, x).exp()
    cap = torch.where(advantages > 0, cap_pos, cap_neg)
    return Factor(torch.minimum(w, cap) * keep, keep.float(), keep & (w > cap))


@torch.no_grad()
def fipo(
    log_ratio: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    half_life: float,
    low: float,
    high: float,
    safety: float,
    dual_clip: float,
) -> Factor:
    """FIPO (arXiv 2603.19835): PPO with dual clip on ``f_t A_t``, f_t the exponential of discounted future log ratios.

    ``F_t = sum_{k>=t} 2^{-(k-t)/half_life} log rho_k`` over valid tokens with rho_k <= dual_clip, the distance counted
    in valid tokens; ``f_t = clip(exp(F_t), low, high)``, of a token with A < 0 and rho > safety between 0.8 and 1. A
    response with two or more tokens beyond the dual clip (A < 0, rho > dual_clip) is masked.
    """
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    rho = x.exp()
    future = _discounted_future(torch.where(x <= math.log(dual_clip), x, 0.0), valid, 0.5 ** (1.0 / half_life))
    free = future.exp()
    f = free.clamp(low, high)
    f = torch.where((advantages < 0) & (rho > safety), f.clamp(0.8, 1.0), f)
    beyond = valid & (advantages < 0) & (rho > dual_clip)
    keep = valid & ~ppo_clipped(rho, advantages, 1.0 - eps_low, 1.0 + eps_high) & ~beyond
    keep &= beyond.sum(-1, keepdim=True) < 2
    return Factor(f.float() * rho * keep, keep.float(), keep & (f != free))


@torch.no_grad()
def vespo(
    log_ratio: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Factor:
    """VESPO (arXiv 2602.10693): ``W^k exp(lambda (1 - W))`` on every token, W the product of the response's ratios.

    k and lambda by the sign of A; the logarithm of W is clamped to +-20.
    """
    valid, x = _prepared(log_ratio, response_mask, advantages=advantages)
    log_w = x.sum(-1, keepdim=True, dtype=torch.float64).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    up = advantages >= 0
    k, lam = torch.where(up, k_pos, k_neg), torch.where(up, lambda_pos, lambda_neg)
    phi = (k * log_w + lam * (1.0 - log_w.exp())).exp().float()
    weight = torch.where(valid, phi, 0.0)
    return Factor(weight, valid.float())


def _prepared(log_ratio: Tensor, response_mask: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
    """(valid, log rho in float32, clamped, 0 on padding)."""
    require_same_shape("response_mask", response_mask=response_mask, log_ratio=log_ratio, **others)
    valid = response_mask.bool()
    x = log_ratio.float().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return valid, torch.where(valid, x, 0.0)


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Over the valid tokens of each row, ``[B, 1]``; 0 of a row without any. ``values`` are 0 elsewhere."""
    return (values.sum(-1, keepdim=True, dtype=torch.float64) / valid.sum(-1, keepdim=True).clamp_min(1)).float()


def _ratio(x: Tensor, valid: Tensor, level: str) -> Tensor:
    if level == "token":
        return x.exp()
    if level == "sequence":
        log_k = x.sum(-1, keepdim=True, dtype=torch.float64).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).float()
    elif level == "geometric":
        log_k = _mean(x, valid)
    else:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    return log_k.exp().expand_as(x)


def _discounted_future(values: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """``sum_{k>=t} gamma^(k-t) values_k`` over valid tokens, distances in valid tokens; float64 ``[B, T]``."""
    batch, length = values.shape
    # Valid tokens side by side at the beginning of each row, and zeros behind them.
    order = (~valid).to(torch.int8).sort(dim=-1, stable=True).indices
    row = values.double().masked_fill(~valid, 0.0).gather(-1, order)
    padding = -length % _CHUNK
    row = torch.nn.functional.pad(row, (0, padding)).view(batch, -1, _CHUNK)
    step = torch.arange(_CHUNK, device=values.device)
    distance = (step[:, None] - step[None, :]).double()  # of k (rows) from t (columns)
    inside = row @ torch.where(distance >= 0, gamma ** distance.clamp_min(0), 0.0)
    after = torch.zeros(batch, dtype=torch.float64, device=values.device)
    fade = gamma ** (_CHUNK - step).double()
    sums = []
    for chunk in reversed(inside.unbind(1)):
        total = chunk + after[:, None] * fade
        after = total[:, 0]
        sums.append(total)
    flat = torch.cat(sums[::-1], -1)[:, :length] if sums else row.flatten(1)[:, :length]
    return torch.zeros(batch, length, dtype=torch.float64, device=values.device).scatter(-1, order, flat)
