"""The algorithm, in pure torch: divergences, position weights, prefix budgets, masks and surrogates.

Reading order: divergence -> weights -> masks -> surrogate; then importance (the methods beyond Table 1) and bounds.
docs/equations.md leads from each equation to its function and tests. Shapes: ``[B, T]`` is a batch of responses,
right-padded; ``response_mask`` is 1 on valid response tokens and may have holes (position t then counts valid tokens
only).
"""

from cppo_verl.core.bounds import Bounds, realised_bounds
from cppo_verl.core.divergence import binary_kl, binary_tv, k3, topk_kl, topk_tv
from cppo_verl.core.importance import (
    Factor,
    aspo,
    banded,
    drpo,
    fipo,
    gmpo,
    gspo,
    m2po_mask,
    opsm_mask,
    sapo,
    truncated,
    vespo,
)
from cppo_verl.core.masks import TrustRegion, cppo_mask, dppo_mask, soft_gate, trm_mask
from cppo_verl.core.surrogate import (
    cispo_loss,
    clip_loss,
    lowest_before,
    minpro_loss,
    ppo_clipped,
    ratio_loss,
    weighted_loss,
)
from cppo_verl.core.weights import position_weights, prefix_budget, quarters

__all__ = [
    "Bounds",
    "Factor",
    "TrustRegion",
    "aspo",
    "banded",
    "binary_kl",
    "binary_tv",
    "cispo_loss",
    "clip_loss",
    "cppo_mask",
    "dppo_mask",
    "drpo",
    "fipo",
    "gmpo",
    "gspo",
    "k3",
    "lowest_before",
    "m2po_mask",
    "minpro_loss",
    "opsm_mask",
    "position_weights",
    "ppo_clipped",
    "prefix_budget",
    "quarters",
    "ratio_loss",
    "realised_bounds",
    "sapo",
    "soft_gate",
    "topk_kl",
    "topk_tv",
    "trm_mask",
    "truncated",
    "vespo",
    "weighted_loss",
]
