"""Which tokens may move away from the rollout policy: the masks of CPPO, DPPO and TRM, and CPPO's soft gate.

Prefix sums are accumulated in float64 and compared in float32, so that a threshold that is hit exactly is met
(the comparison is inclusive) whatever the length. None of this carries a gradient.
"""

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from cppo_verl.core.checks import require_not_nan, require_positive, require_same_shape


class TrustRegion(NamedTuple):
    """Outcome of a mask; every field is ``[B, T]`` and False / 0 on padding."""

    keep: Tensor
    """bool: the token's gradient is used."""
    token_exceeded: Tensor
    """bool: w_t D_t > delta, on valid tokens, whatever the direction of the update."""
    prefix_exceeded: Tensor
    """bool: S_t > delta + delta_b W_{t-1}, on valid tokens, whatever the direction of the update."""
    threshold: Tensor
    """float32: c_t; negative once the prefix has overspent its budget."""
    excess: Tensor
    """float32: x_t of Eq. 19, whatever the direction of the update; above 1 exactly where a constraint is exceeded."""


@torch.no_grad()
def cppo_mask(
    log_ratio: Tensor,
    advantages: Tensor,
    divergence: Tensor,
    response_mask: Tensor,
    *,
    delta: float,
    weights: Tensor,
    delta_b: Tensor | None,
    validate: bool = True,
) -> TrustRegion:
    """Eq. 8-10, Algorithm 1: keep_t = [A_t (rho_t - 1) <= 0] or [w_t D_t <= c_t].

    ``c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1})``; S and W accumulate over all valid tokens, kept or not.

    Args:
        log_ratio: log pi - log mu of the sampled tokens, ``[B, T]``.
        advantages, divergence, response_mask, weights: ``[B, T]``.
        delta: token threshold, > 0, in the divergence's unit.
        delta_b: prefix budget per response, ``[B]``, >= 0; None for no prefix constraint.
    """
    valid = response_mask.bool()
    _check_region(log_ratio, advantages, divergence, valid, delta, weights, delta_b, validate)
    w = weights.double().masked_fill(~valid, 0.0)
    z = w * divergence.double().masked_fill(~valid, 0.0)
    token_exceeded = valid & (z.float() > delta)
    if delta_b is None:
        prefix_exceeded, threshold, x = torch.zeros_like(valid), valid.float() * delta, z / delta
    else:
        spent, weight_before = z.cumsum(-1), _before(w.cumsum(-1))
        # delta_b = inf means "never binding", also before the first token, where inf * 0 would be NaN.
        bound = delta + torch.where(weight_before > 0, delta_b.double().unsqueeze(-1) * weight_before, 0.0)
        prefix_exceeded = valid & (spent.float() > bound.float())
        threshold = torch.where(valid, (bound - _before(spent)).clamp_max(delta), 0.0).float()
        x = torch.maximum(z / delta, spent / bound)
    exceeded = token_exceeded | prefix_exceeded
    keep = valid & (_corrective(log_ratio, advantages) | ~exceeded)
    return TrustRegion(keep, token_exceeded, prefix_exceeded, threshold, _excess(x, exceeded, valid))


@torch.no_grad()
def dppo_mask(
    log_ratio: Tensor,
    advantages: Tensor,
    divergence: Tensor,
    response_mask: Tensor,
    *,
    delta: float,
    validate: bool = True,
) -> TrustRegion:
    """DPPO (arXiv 2602.04879): CPPO with w = 1 and no prefix budget. Shapes as in :func:`cppo_mask`."""
    weights = response_mask.bool().float()
    return cppo_mask(
        log_ratio,
        advantages,
        divergence,
        response_mask,
        delta=delta,
        weights=weights,
        delta_b=None,
        validate=validate,
    )


@torch.no_grad()
def trm_mask(
    divergence: Tensor,
    response_mask: Tensor,
    *,
    delta_max: float | None = None,
    delta_avg: float | None = None,
    validate: bool = True,
) -> TrustRegion:
    """TRM (arXiv 2512.23075): keep the whole response iff ``max_t D_t <= delta_max`` and ``mean_t D_t <= delta_avg``.

    Either threshold may be None (not applied), not both. ``token_exceeded`` marks the tokens above ``delta_max``,
    ``prefix_exceeded`` every valid token of a response whose mean exceeds ``delta_avg``.
    """
    require_same_shape("response_mask", response_mask=response_mask, divergence=divergence)
    if delta_max is None and delta_avg is None:
        raise ValueError("delta_max and delta_avg are both None: at least one threshold is needed")
    valid = response_mask.bool()
    if validate:
        for name, value in (("delta_max", delta_max), ("delta_avg", delta_avg)):
            if value is not None:
                require_positive(name, value)
        require_not_nan(valid, divergence=divergence)
    spent = divergence.double().masked_fill(~valid, 0.0)
    mean = (spent.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)).float()
    never = torch.zeros_like(valid)
    token_exceeded = never if delta_max is None else valid & (spent.float() > delta_max)
    prefix_exceeded = never if delta_avg is None else valid & (mean > delta_avg)
    keep = valid & ~(token_exceeded.any(-1, keepdim=True) | prefix_exceeded)
    limit = delta_avg if delta_max is None else delta_max
    x = torch.zeros_like(spent) if delta_max is None else spent / delta_max
    if delta_avg is not None:
        x = torch.maximum(x, mean.double() / delta_avg)
    excess = _excess(x, token_exceeded | prefix_exceeded, valid)
    return TrustRegion(keep, token_exceeded, prefix_exceeded, valid.float() * float(limit or 0.0), excess)


@overload
def soft_gate(log_ratio: TrustRegion) -> Tensor: ...
@overload
def soft_gate(
    log_ratio: Tensor,
    advantages: Tensor,
    divergence: Tensor,
    response_mask: Tensor,
    *,
    delta: float,
    weights: Tensor,
    delta_b: Tensor | None,
    validate: bool = True,
) -> Tensor: ...
@torch.no_grad()
def soft_gate(log_ratio: Tensor | TrustRegion, *arguments: Any, **settings: Any) -> Tensor:
    """Eq. 19-20 (Appendix C): 1 where the mask keeps, else ``min(1, 1/x_t)``; float32 ``[B, T]``, 0 on padding.

    ``soft_gate(region)`` takes what :func:`cppo_mask` returned; with the arguments of that function it is called here.
    """
    region = log_ratio if isinstance(log_ratio, TrustRegion) else cppo_mask(log_ratio, *arguments, **settings)
    # What is not kept has x_t > 1, or is padding, where it is 0.
    beyond = torch.where(region.excess > 1, region.excess.reciprocal(), 0.0)
    return torch.where(region.keep, 1.0, beyond)


def _excess(x: Tensor, exceeded: Tensor, valid: Tensor) -> Tensor:
    """x in float32, on the side of 1 that the decision was made for: rounding could carry a tie over."""
    x = x.float()
    x = torch.where(exceeded, x.clamp_min(1.0 + torch.finfo(torch.float32).eps), x.clamp_max(1.0))
    return torch.where(valid, x, 0.0)


def _before(cumulative: Tensor) -> Tensor:
    """Sums over j < t from sums over j <= t, by a shift: subtracting the last term would turn infinity into NaN."""
    return torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]], -1)


def _corrective(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """A_t (rho_t - 1) <= 0, by signs: a product of small numbers would underflow to 0, and exp() rounds to 1."""
    return torch.sign(advantages.float()) * torch.sign(log_ratio.float()) <= 0


def _check_region(
    log_ratio: Tensor,
    advantages: Tensor,
    divergence: Tensor,
    valid: Tensor,
    delta: float,
    weights: Tensor,
    delta_b: Tensor | None,
    validate: bool,
) -> None:
    require_same_shape(
        "response_mask",
        response_mask=valid,
        log_ratio=log_ratio,
        advantages=advantages,
        divergence=divergence,
        weights=weights,
    )
    if delta_b is not None and delta_b.shape != (valid.shape[0],):
        raise ValueError(
            f"delta_b must have shape [{valid.shape[0]}] (one budget a response), got {list(delta_b.shape)}"
        )
    if not validate:
        return
    require_positive("delta", delta)
    require_not_nan(valid, log_ratio=log_ratio, advantages=advantages, divergence=divergence, weights=weights)
    if delta_b is not None and not bool((delta_b >= 0).all()):
        raise ValueError(f"delta_b must be >= 0, got {delta_b.min().item()}")
