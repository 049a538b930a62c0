"""The methods of Table 1, one class each, over one shared divergence, surrogate family and reduction.

A method is its typed settings (explained, with their defaults, in ``configs/method/<name>.yaml``) plus one rule that
turns a batch of tokens into per-token losses. Hydra builds it from the config's ``_target_``; nothing here knows verl.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cppo_verl import core


class Measure(NamedTuple):
    """How a divergence D_t is computed: a function of ``core`` and what it needs to know."""

    function: Callable[..., Tensor]
    over_topk: bool
    """Whether it takes log pi and log mu at the rollout's K most likely tokens, besides those of the sampled token."""


# By ``divergence.name``.
MEASURES = {
    "topk_tv": Measure(core.topk_tv, over_topk=True),
    "topk_kl": Measure(core.topk_kl, over_topk=True),
    "binary_tv": Measure(core.binary_tv, over_topk=False),
    "binary_kl": Measure(core.binary_kl, over_topk=False),
    "k3": Measure(lambda log_prob, rollout_log_prob: core.k3(log_prob - rollout_log_prob), over_topk=False),
}


class Tokens(NamedTuple):
    """One micro-batch of whole responses, right-padded; everything ``[B, T]`` unless said otherwise."""

    log_prob: Tensor
    """log pi of the sampled tokens, with gradient."""
    rollout_log_prob: Tensor
    """log mu of the sampled tokens, as vLLM sampled them."""
    advantages: Tensor
    valid: Tensor
    """bool: the response tokens that count; verl's response_mask without the groups that ``run.mask_std_0`` skips."""
    divergence: Tensor
    """D_t."""
    response_seeds: Tensor | None = None
    """int64 ``[B]``: one seed per response, for the shuffled weights only."""

    @property
    def log_ratio(self) -> Tensor:
        """log rho_t = log pi - log mu, float32, without gradient."""
        return self.log_prob.detach().float() - self.rollout_log_prob.float()


class Outcome(NamedTuple):
    """What a method decided; all ``[B, T]`` but ``delta_b``."""

    loss: Tensor
    """Per-token loss, differentiable in ``log_prob``."""
    gate: Tensor
    """float: factor on the token's gradient, 0 = masked, 1 = untouched."""
    token_cause: Tensor
    """bool: if this token is masked, a token threshold did it (otherwise the prefix or mean constraint)."""
    delta_b: Tensor | None = None
    """``[B]``: effective prefix budget, where the method has one."""


@dataclass(frozen=True)
class Cppo:
    """CPPO, Eq. 8-11; with ``soft_gate`` Eq. 19-20."""

    name: str
    delta: float
    w_min: float
    weights: str
    horizon: int | None
    delta_b: float | None
    delta_b_quantile: float | None
    delta_b_max_factor: float
    soft_gate: bool
    ratio_cap: float | None

    def __post_init__(self) -> None:
        _check_positive("delta", self.delta)
        _check(0 < self.w_min <= 1, "w_min", self.w_min, "in (0, 1]")
        _check(self.weights in core.weights.SCHEDULES, "weights", self.weights, f"one of {core.weights.SCHEDULES}")
        _check(self.horizon is None or self.horizon >= 1, "horizon", self.horizon, "1 or more tokens, or null")
        _check(self.delta_b is None or self.delta_b >= 0, "delta_b", self.delta_b, ">= 0, or null for no prefix budget")
        quantile = self.delta_b_quantile
        _check(quantile is None or 0 <= quantile <= 1, "delta_b_quantile", quantile, "in [0, 1], or null")
        _check(self.delta_b_max_factor >= 1, "delta_b_max_factor", self.delta_b_max_factor, ">= 1")
        _check_ratio_cap(self.ratio_cap)

    @property
    def needs_response_seeds(self) -> bool:
        return self.weights == "shuffled"

    def __call__(self, tokens: Tokens) -> Outcome:
        delta_b = self._prefix_budget(tokens)
        region = core.cppo_mask(
            tokens.log_ratio,
            tokens.advantages,
            tokens.divergence,
            tokens.valid,
            delta=self.delta,
            weights=self._weights(tokens),
            delta_b=delta_b,
            validate=False,
        )
        gate = core.soft_gate(region) if self.soft_gate else region.keep.float()
        return Outcome(_ratio_loss(tokens, gate, self.ratio_cap), gate, region.token_exceeded, delta_b)

    def _prefix_budget(self, tokens: Tokens) -> Tensor | None:
        if self.delta_b is None:
            return None
        return core.prefix_budget(
            tokens.divergence,
            tokens.valid,
            delta_b=self.delta_b,
            quantile=self.delta_b_quantile,
            max_factor=self.delta_b_max_factor,
            validate=False,
        )

    def _weights(self, tokens: Tokens) -> Tensor:
        weigh = partial(
            core.position_weights, w_min=self.w_min, schedule=self.weights, horizon=self.horizon, validate=False
        )
        if not self.needs_response_seeds:
            return weigh(tokens.valid)
        if tokens.response_seeds is None:
            raise ValueError("weights=shuffled needs one seed per response, so that micro-batching cannot change it")
        rows = [
            weigh(row[None], generator=torch.Generator().manual_seed(seed))
            for row, seed in zip(tokens.valid, tokens.response_seeds.tolist(), strict=True)
        ]
        return torch.cat(rows)


@dataclass(frozen=True)
class Dppo:
    """DPPO: keep_t = [A_t (rho_t - 1) <= 0] or [D_t <= delta]."""

    name: str
    delta: float
    ratio_cap: float | None
    needs_response_seeds = False

    def __post_init__(self) -> None:
        _check_positive("delta", self.delta)
        _check_ratio_cap(self.ratio_cap)

    def __call__(self, tokens: Tokens) -> Outcome:
        region = core.dppo_mask(
            tokens.log_ratio,
            tokens.advantages,
            tokens.divergence,
            tokens.valid,
            delta=self.delta,
            validate=False,
        )
        gate = region.keep.float()
        return Outcome(_ratio_loss(tokens, gate, self.ratio_cap), gate, region.token_exceeded)


@dataclass(frozen=True)
class Trm:
    """TRM-Max, TRM-Avg or both: the whole response is kept or masked."""

    name: str
    delta_max: float | None
    delta_avg: float | None
    allow_tv: bool
    ratio_cap: float | None
    needs_response_seeds = False

    def __post_init__(self) -> None:
        _check(self.delta_max is not None or self.delta_avg is not None, "delta_max", None, "set, or delta_avg must be")
        for name in ("delta_max", "delta_avg"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        _check_ratio_cap(self.ratio_cap)

    def __call__(self, tokens: Tokens) -> Outcome:
        region = core.trm_mask(
            tokens.divergence,
            tokens.valid,
            delta_max=self.delta_max,
            delta_avg=self.delta_avg,
            validate=False,
        )
        gate = region.keep.float()
        by_max = region.token_exceeded.any(-1, keepdim=True).expand_as(region.keep)
        return Outcome(_ratio_loss(tokens, gate, self.ratio_cap), gate, by_max)


@dataclass(frozen=True)
class _RatioClipping:
    """Settings of the methods that clip the importance ratio to [1 - eps_low, 1 + eps_high]."""

    name: str
    eps_low: float
    eps_high: float
    needs_response_seeds = False

    def __post_init__(self) -> None:
        _check(0 <= self.eps_low <= 1, "eps_low", self.eps_low, "in [0, 1]")
        _check(self.eps_high >= 0, "eps_high", self.eps_high, ">= 0")


class Grpo(_RatioClipping):
    """GRPO with clip-higher. A clipped token has gradient 0 and counts as masked by a token threshold."""

    def __call__(self, tokens: Tokens) -> Outcome:
        loss = core.clip_loss(
            tokens.log_prob,
            tokens.rollout_log_prob,
            tokens.advantages,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
        )
        rho = tokens.log_ratio.exp()
        up = (tokens.advantages > 0) & (rho > 1.0 + self.eps_high)
        down = (tokens.advantages < 0) & (rho < 1.0 - self.eps_low)
        clipped = up | down
        return Outcome(loss, (~clipped).float(), clipped)


class Cispo(_RatioClipping):
    """CISPO: every token keeps a gradient; its weight is clipped."""

    def __call__(self, tokens: Tokens) -> Outcome:
        loss = core.cispo_loss(
            tokens.log_prob,
            tokens.rollout_log_prob,
            tokens.advantages,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
        )
        return _unmasked(loss)


class MinPro(_RatioClipping):
    """MinPRO: every token keeps a gradient, weighted by rho_t times the smallest ratio before it, clipped."""

    def __call__(self, tokens: Tokens) -> Outcome:
        loss = core.minpro_loss(
            tokens.log_prob,
            tokens.rollout_log_prob,
            tokens.advantages,
            tokens.valid,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
        )
        return _unmasked(loss)


def _ratio_loss(tokens: Tokens, gate: Tensor, ratio_cap: float | None) -> Tensor:
    return core.ratio_loss(tokens.log_prob, tokens.rollout_log_prob, tokens.advantages, gate, ratio_cap=ratio_cap)


def _unmasked(loss: Tensor) -> Outcome:
    return Outcome(loss, torch.ones_like(loss), torch.zeros_like(loss, dtype=torch.bool))


def _check(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"method.{name} must be {wanted}; got {value}")


def _check_positive(name: str, value: float) -> None:
    _check(value > 0 and not math.isnan(value), name, value, "> 0")


def _check_ratio_cap(value: float | None) -> None:
    _check(value is None or value >= 1, "ratio_cap", value, ">= 1, or null for no cap")
