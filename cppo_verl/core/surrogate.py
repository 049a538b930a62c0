"""Per-token losses ``[B, T]`` of every Table 1 method, to be minimised; differentiable in ``log_prob`` only.

rho_t = pi(y_t|s_t) / mu(y_t|s_t), anchored to the rollout log-probabilities. log rho is clamped to +-20.
"""

import torch
from torch import Tensor

from cppo_verl.core.checks import require_same_shape

# exp(+-20) is far outside any trust region; without the clamp one outlier token overflows to inf.
LOG_RATIO_BOUND = 20.0
# What -inf becomes: -inf - -inf and -inf times 0 are NaN.
LEAST_LOG_PROB = -1e30


def ratio_loss(
    log_prob: Tensor,
    rollout_log_prob: Tensor,
    advantages: Tensor,
    gate: Tensor,
    *,
    ratio_cap: float | None = 20.0,
) -> Tensor:
    """Eq. 11: value ``-gate * min(rho, ratio_cap) * A``, gradient the same times grad log pi (CPPO, DPPO, TRM).

    Args:
        log_prob, rollout_log_prob, advantages: ``[B, T]``.
        gate: keep mask (bool, integer or float) or soft gate, ``[B, T]``; a token with gate 0 has loss and gradient 0.
        ratio_cap: truncated importance weight, stop-gradient (not in the paper; its authors' code uses 20); None: off.
    """
    require_same_shape(
        "log_prob", log_prob=log_prob, rollout_log_prob=rollout_log_prob, advantages=advantages, gate=gate
    )
    used = gate.float() != 0
    with torch.no_grad():
        rho = _log_ratio(torch.where(used, log_prob, 0.0), torch.where(used, rollout_log_prob, 0.0)).exp()
        if ratio_cap is not None:
            rho = rho.clamp_max(ratio_cap)
    return weighted_loss(log_prob, advantages, gate.float() * rho)


def weighted_loss(log_prob: Tensor, advantages: Tensor, weight: Tensor) -> Tensor:
    """Value ``-weight A``, gradient ``-weight A grad log pi``, ``[B, T]``; a token with weight 0 has neither."""
    require_same_shape("log_prob", log_prob=log_prob, advantages=advantages, weight=weight)
    weight = weight.detach().float()
    used = weight != 0
    log_prob = _finite(torch.where(used, log_prob, torch.zeros_like(log_prob)))
    # 1 + log pi - sg(log pi) has value 1 and gradient grad log pi.
    return -(weight * torch.where(used, advantages.detach().float(), 0.0)) * (1.0 + (log_prob - log_prob.detach()))


def clip_loss(
    log_prob: Tensor, rollout_log_prob: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """PPO/GRPO with clip-higher: ``-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)``; no dual clip. ``[B, T]``."""
    require_same_shape("log_prob", log_prob=log_prob, rollout_log_prob=rollout_log_prob, advantages=advantages)
    rho = _log_ratio(log_prob, rollout_log_prob).exp()
    advantages = advantages.detach().float()
    return -torch.minimum(rho * advantages, rho.clamp(1.0 - eps_low, 1.0 + eps_high) * advantages)


def ppo_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """bool: where the smaller of ``ratio A`` and ``clip(ratio, low, high) A`` is the clipped one, without gradient."""
    return ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))


def cispo_loss(
    log_prob: Tensor, rollout_log_prob: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """CISPO: ``-sg(clip(rho, 1 - eps_low, 1 + eps_high)) A log pi``; no mask. ``[B, T]``."""
    require_same_shape("log_prob", log_prob=log_prob, rollout_log_prob=rollout_log_prob, advantages=advantages)
    with torch.no_grad():
        weight = _log_ratio(log_prob, rollout_log_prob).exp().clamp(1.0 - eps_low, 1.0 + eps_high)
    return -weight * advantages.detach().float() * _finite(log_prob)


def minpro_loss(
    log_prob: Tensor,
    rollout_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> Tensor:
    """MinPRO (arXiv 2601.22718): ``-sg(clip(rho_min_t rho_t, 1 - eps_low, 1 + eps_high)) A log pi``, ``[B, T]``.

    ``rho_min_t = min_{i<t} rho_i`` over the valid tokens before t, and 1 for the first one. 0 on padding.
    """
    require_same_shape(
        "log_prob",
        log_prob=log_prob,
        rollout_log_prob=rollout_log_prob,
        advantages=advantages,
        response_mask=response_mask,
    )
    valid = response_mask.bool()
    log_prob = _finite(torch.where(valid, log_prob, torch.zeros_like(log_prob)))
    with torch.no_grad():
        log_ratio = _log_ratio(log_prob, torch.where(valid, rollout_log_prob, 0.0))
        weight = (lowest_before(log_ratio, valid) + log_ratio).exp().clamp(1.0 - eps_low, 1.0 + eps_high)
        weight = weight * torch.where(valid, advantages.float(), 0.0)
    return -weight * log_prob


@torch.no_grad()
def lowest_before(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """log rho_min_t = min_{i<t} log rho_i over the valid tokens before t, 0 for the first; clamped, ``[B, T]``."""
    valid = response_mask.bool()
    clamped = log_ratio.float().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    lowest = clamped.masked_fill(~valid, torch.inf).cummin(-1).values
    before = torch.cat([torch.full_like(lowest[:, :1], torch.inf), lowest[:, :-1]], -1)
    return torch.where(torch.isinf(before), torch.zeros_like(before), before)


def _log_ratio(log_prob: Tensor, rollout_log_prob: Tensor) -> Tensor:
    """log rho_t in float32, clamped; the rollout side never carries a gradient."""
    difference = _finite(log_prob) - _finite(rollout_log_prob.detach())
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _finite(log_prob: Tensor) -> Tensor:
    return log_prob.float().clamp_min(LEAST_LOG_PROB)
