"""What Section 3's bounds on the error of the surrogate come to on given responses."""

from typing import NamedTuple

import torch
from torch import Tensor

from cppo_verl.core.checks import require_same_shape


class Bounds(NamedTuple):
    """Bounds on |Delta| for rewards in [-1, 1], with the smallest constants that a response keeps to; float64 ``[B]``.

    The theorems ask for constants that hold for every response that can be sampled: a response alone gives a lower
    estimate of them, and so does a divergence that is a lower bound of the total variation (Top-K, binary).
    """

    uniform: Tensor
    """2 T (T - 1) delta^2 with delta = max_t D_t: a uniform threshold."""
    cppo: Tensor
    """2 T (T - 1) lbar delta_b with lbar = max_t D_t, delta_b = max_{m<T} P_m / W_m: Theorem 1. At most ``uniform``."""


@torch.no_grad()
def realised_bounds(divergence: Tensor, weights: Tensor, response_mask: Tensor) -> Bounds:
    """Of each response, from its divergences D_t and weights w_t (P_m = sum of w_t D_t up to m, W_m that of w_t).

    Args:
        divergence: total variation (or a lower bound of it), ``[B, T]``.
        weights: ``[B, T]``, above 0 on valid tokens.
        response_mask: ``[B, T]``; a response with fewer than two valid tokens has bounds of 0.
    """
    require_same_shape("response_mask", response_mask=response_mask, divergence=divergence, weights=weights)
    valid = response_mask.bool()
    d = divergence.double().masked_fill(~valid, 0.0)
    w = weights.double().masked_fill(~valid, 0.0)
    before_last = valid & (valid.cumsum(-1) < valid.sum(-1, keepdim=True))
    spent, weight = (w * d).cumsum(-1), w.cumsum(-1)
    rate = torch.where(before_last, spent / weight, 0.0)
    length = valid.sum(-1).double()
    largest = _largest(d)
    factor = 2 * length * (length - 1)
    return Bounds(factor * largest.square(), factor * largest * _largest(rate))


def _largest(rows: Tensor) -> Tensor:
    """Of each row; 0 of rows without a column."""
    return rows.amax(-1) if rows.shape[-1] else rows.sum(-1)
