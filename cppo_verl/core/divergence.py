"""Divergences D_t between the rollout distribution mu(.|s_t) and the policy pi(.|s_t) (Section 2.3, Appendix D).

All take natural-log probabilities on temperature-scaled logits, compute in float32 without gradient and return
``[B, T]`` >= 0, exactly 0 where the log-probabilities agree. Padding is not known here: the masks ignore it.
"""

import math

import torch
from torch import Tensor

from cppo_verl.core.checks import require_same_shape

# Smallest probability a logarithm sees: a KL divergence stays finite where rounding made a probability 0.
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def binary_tv(log_prob: Tensor, rollout_log_prob: Tensor) -> Tensor:
    """Total variation on {y_t, everything else}: ``|pi(y_t) - mu(y_t)|``. Shapes ``[B, T]``."""
    require_same_shape("log_prob", log_prob=log_prob, rollout_log_prob=rollout_log_prob)
    return (log_prob.float().exp() - rollout_log_prob.float().exp()).abs()


@torch.no_grad()
def binary_kl(log_prob: Tensor, rollout_log_prob: Tensor) -> Tensor:
    """``KL(mu || pi)`` on {y_t, everything else}, nats. Shapes ``[B, T]``."""
    require_same_shape("log_prob", log_prob=log_prob, rollout_log_prob=rollout_log_prob)
    log_pi, log_mu = log_prob.float(), rollout_log_prob.float()
    sampled = _kl_cell(log_mu.exp(), log_mu, log_pi)
    rest_mu, rest_pi = -torch.expm1(log_mu), -torch.expm1(log_pi)
    rest = _kl_cell(rest_mu, rest_mu.clamp_min(_TINY).log(), rest_pi.clamp_min(_TINY).log())
    return (sampled + rest).clamp_min(0.0)


@torch.no_grad()
def topk_tv(
    log_prob: Tensor,
    rollout_log_prob: Tensor,
    topk_log_prob: Tensor,
    rollout_topk_log_prob: Tensor,
    sampled_in_topk: Tensor,
) -> Tensor:
    """Top-K reduced total variation: K cells, the sampled token if it is not among them, and one "other" cell.

    Args:
        log_prob, rollout_log_prob: log pi and log mu of the sampled token, ``[B, T]``.
        topk_log_prob, rollout_topk_log_prob: log pi and log mu at the K ids most likely under mu, ``[B, T, K]``.
        sampled_in_topk: whether the sampled token is one of those ids, bool ``[B, T]``.
    """
    _check_topk(log_prob, rollout_log_prob, topk_log_prob, rollout_topk_log_prob, sampled_in_topk)
    pi, mu = topk_log_prob.float().exp(), rollout_topk_log_prob.float().exp()
    pi_own, mu_own, pi_other, mu_other = _partition(log_prob, rollout_log_prob, pi, mu, sampled_in_topk)
    cells = (pi - mu).abs().sum(-1) + (pi_own - mu_own).abs() + (pi_other - mu_other).abs()
    return 0.5 * cells


@torch.no_grad()
def topk_kl(
    log_prob: Tensor,
    rollout_log_prob: Tensor,
    topk_log_prob: Tensor,
    rollout_topk_log_prob: Tensor,
    sampled_in_topk: Tensor,
) -> Tensor:
    """Top-K reduced ``KL(mu || pi)``, nats, on the partition of :func:`topk_tv` (same arguments and shapes)."""
    _check_topk(log_prob, rollout_log_prob, topk_log_prob, rollout_topk_log_prob, sampled_in_topk)
    log_pi, log_mu = topk_log_prob.float(), rollout_topk_log_prob.float()
    pi, mu = log_pi.exp(), log_mu.exp()
    _, mu_own, pi_other, mu_other = _partition(log_prob, rollout_log_prob, pi, mu, sampled_in_topk)
    own = _kl_cell(mu_own, rollout_log_prob.float(), log_prob.float())
    other = _kl_cell(mu_other, mu_other.clamp_min(_TINY).log(), pi_other.clamp_min(_TINY).log())
    return (_kl_cell(mu, log_mu, log_pi).sum(-1) + own + other).clamp_min(0.0)


@torch.no_grad()
def k3(log_ratio: Tensor) -> Tensor:
    """Sampled estimate of KL(mu || pi) from log rho_t: ``rho - 1 - log rho``, nats. Shape ``[B, T]``."""
    log_ratio = log_ratio.float()
    return (torch.expm1(log_ratio) - log_ratio).clamp_min(0.0)


def _kl_cell(mu: Tensor, log_mu: Tensor, log_pi: Tensor) -> Tensor:
    """mu (log mu - log pi), with the limit 0 at mu = 0 and log pi bounded below."""
    log_pi = log_pi.clamp_min(math.log(_TINY))
    return torch.where(mu > 0, mu * (log_mu - log_pi), torch.zeros_like(mu))


def _partition(
    log_prob: Tensor, rollout_log_prob: Tensor, pi: Tensor, mu: Tensor, sampled_in_topk: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mass of the sampled token's own cell (0 where it is among the K) and of "other", under pi and under mu."""
    outside = (~sampled_in_topk.bool()).float()
    zero = torch.zeros_like(outside)
    pi_own = torch.where(outside > 0, log_prob.float().exp(), zero)
    mu_own = torch.where(outside > 0, rollout_log_prob.float().exp(), zero)
    pi_other = (1.0 - pi.sum(-1) - pi_own).clamp_min(0.0)
    mu_other = (1.0 - mu.sum(-1) - mu_own).clamp_min(0.0)
    return pi_own, mu_own, pi_other, mu_other


def _check_topk(
    log_prob: Tensor, rollout_log_prob: Tensor, topk_log_prob: Tensor, rollout_topk_log_prob: Tensor, in_topk: Tensor
) -> None:
    require_same_shape("log_prob", log_prob=log_prob, rollout_log_prob=rollout_log_prob, sampled_in_topk=in_topk)
    for name, tensor in (("topk_log_prob", topk_log_prob), ("rollout_topk_log_prob", rollout_topk_log_prob)):
        if tensor.dim() != 3 or tensor.shape[:2] != log_prob.shape:
            raise ValueError(f"{name} must have shape {[*log_prob.shape, 'K']}, got {list(tensor.shape)}")
    if topk_log_prob.shape != rollout_topk_log_prob.shape:
        raise ValueError(
            f"topk_log_prob has K = {topk_log_prob.shape[-1]}, "
            f"rollout_topk_log_prob has {rollout_topk_log_prob.shape[-1]}"
        )
