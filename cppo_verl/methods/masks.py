"""Methods that keep or mask tokens; what is kept has the gradient of Eq. 11."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cppo_verl import core
from cppo_verl.methods.tokens import Outcome, Tokens, check, check_positive, of_factor

# Importance weights of the tokens that are kept: min(k, ratio_cap) with k the token's ratio, the product or the
# geometric mean of the response's; or 1.
IMPORTANCE = (*core.importance.LEVELS, "none")


@dataclass(frozen=True)
class Masked:
    """What the methods share that mask tokens and weigh the rest by an importance ratio: Eq. 11."""

    name: str
    importance: str
    ratio_cap: float | None

    def __post_init__(self) -> None:
        check(self.importance in IMPORTANCE, "importance", self.importance, f"one of {', '.join(IMPORTANCE)}")
        cap = self.ratio_cap
        check(cap is None or cap >= 1, "ratio_cap", cap, ">= 1, or null for no cap")

    @property
    def needs_response_seeds(self) -> bool:
        """Whether ``Tokens.response_seeds`` has to be there."""
        return False

    def outcome(self, tokens: Tokens, gate: Tensor, token_cause: Tensor, **others: Tensor | None) -> Outcome:
        """The gate times the importance weight, as a loss."""
        columns = (tokens.log_prob, tokens.rollout_log_prob, tokens.advantages)
        cap = math.inf if self.ratio_cap is None else self.ratio_cap
        if self.importance == "none":
            loss, cut = core.weighted_loss(tokens.log_prob, tokens.advantages, gate * tokens.valid), None
        else:
            factor = core.truncated(tokens.log_ratio, tokens.valid, level=self.importance, cap=cap)
            cut = None if self.ratio_cap is None or factor.clipped is None else factor.clipped & (gate > 0)
            loss = (
                core.ratio_loss(*columns, gate, ratio_cap=self.ratio_cap)
                if self.importance == "token"
                else core.weighted_loss(tokens.log_prob, tokens.advantages, gate * factor.weight)
            )
        return Outcome(loss, gate, token_cause, clipped=cut, **others)


@dataclass(frozen=True)
class Cppo(Masked):
    """CPPO, Eq. 8-11; with ``soft_gate`` Eq. 19-20."""

    delta: float
    w_min: float
    weights: str
    horizon: int | None
    delta_b: float | None
    delta_b_quantile: float | None
    delta_b_scale: float
    delta_b_max_factor: float
    length_reference: int | None
    soft_gate: bool

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)
        check(0 < self.w_min <= 1, "w_min", self.w_min, "in (0, 1]")
        check(self.weights in core.weights.SCHEDULES, "weights", self.weights, f"one of {core.weights.SCHEDULES}")
        check(self.horizon is None or self.horizon >= 1, "horizon", self.horizon, "1 or more tokens, or null")
        check(self.delta_b is None or self.delta_b >= 0, "delta_b", self.delta_b, ">= 0, or null for no prefix budget")
        quantile = self.delta_b_quantile
        check(quantile is None or 0 <= quantile <= 1, "delta_b_quantile", quantile, "in [0, 1], or null")
        check(self.delta_b_scale > 0, "delta_b_scale", self.delta_b_scale, "> 0")
        reference = self.length_reference
        check(reference is None or reference >= 2, "length_reference", reference, "2 or more tokens, or null")
        check(self.delta_b_max_factor >= 1, "delta_b_max_factor", self.delta_b_max_factor, ">= 1")
        super().__post_init__()

    @property
    def needs_response_seeds(self) -> bool:
        return self.weights == "shuffled"

    def __call__(self, tokens: Tokens) -> Outcome:
        # Thresholds times a number are divergences over it.
        room = self._room(tokens)
        if room is not None:
            tokens = tokens._replace(divergence=tokens.divergence / room)
        delta_b, weights = self._prefix_budget(tokens), self._weights(tokens)
        region = core.cppo_mask(
            tokens.log_ratio,
            tokens.advantages,
            tokens.divergence,
            tokens.valid,
            delta=self.delta,
            weights=weights,
            delta_b=delta_b,
            validate=False,
        )
        gate = core.soft_gate(region) if self.soft_gate else region.keep.float()
        exceeded = None if delta_b is None else region.prefix_exceeded
        if room is not None and delta_b is not None:
            delta_b = delta_b * room.squeeze(-1)
        return self.outcome(
            tokens, gate, region.token_exceeded, delta_b=delta_b, weights=weights, prefix_exceeded=exceeded
        )

    def _room(self, tokens: Tokens) -> Tensor | None:
        """Factor on delta and delta_b of each response, ``[B, 1]``."""
        if self.length_reference is None:
            return None
        length = tokens.valid.sum(-1, keepdim=True).clamp_min(2).double()
        return (self.length_reference * (self.length_reference - 1) / (length * (length - 1))).sqrt().float()

    def _prefix_budget(self, tokens: Tokens) -> Tensor | None:
        if self.delta_b is None:
            return None
        return core.prefix_budget(
            tokens.divergence,
            tokens.valid,
            delta_b=self.delta_b,
            quantile=self.delta_b_quantile,
            scale=self.delta_b_scale,
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
class Dppo(Masked):
    """DPPO: keep_t = [A_t (rho_t - 1) <= 0] or [D_t <= delta]."""

    delta: float

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)
        super().__post_init__()

    def __call__(self, tokens: Tokens) -> Outcome:
        region = core.dppo_mask(
            tokens.log_ratio,
            tokens.advantages,
            tokens.divergence,
            tokens.valid,
            delta=self.delta,
            validate=False,
        )
        return self.outcome(tokens, region.keep.float(), region.token_exceeded)


@dataclass(frozen=True)
class Trm(Masked):
    """TRM-Max, TRM-Avg or both: the whole response is kept or masked."""

    delta_max: float | None
    delta_avg: float | None
    allow_tv: bool

    def __post_init__(self) -> None:
        check(self.delta_max is not None or self.delta_avg is not None, "delta_max", None, "set, or delta_avg must be")
        for name in ("delta_max", "delta_avg"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        super().__post_init__()

    def __call__(self, tokens: Tokens) -> Outcome:
        region = core.trm_mask(
            tokens.divergence,
            tokens.valid,
            delta_max=self.delta_max,
            delta_avg=self.delta_avg,
            validate=False,
        )
        by_max = region.token_exceeded.any(-1, keepdim=True).expand_as(region.keep)
        return self.outcome(tokens, region.keep.float(), by_max)


@dataclass(frozen=True)
class M2po(Masked):
    """M2PO: tokens that move away are masked, the largest log(rho)^2 first, until its mean is at most tau."""

    tau: float
    scope: str

    def __post_init__(self) -> None:
        check_positive("tau", self.tau)
        check(self.scope in ("micro_batch", "response"), "scope", self.scope, "micro_batch or response")
        super().__post_init__()

    def __call__(self, tokens: Tokens) -> Outcome:
        joint = self.scope == "micro_batch"
        keep = core.m2po_mask(tokens.log_ratio, tokens.advantages, tokens.valid, tau=self.tau, joint=joint)
        return self.outcome(tokens, keep.float(), tokens.valid & ~keep)


@dataclass(frozen=True)
class ImportanceSampling(Masked):
    """TIS: nothing is masked, the importance weight is capped."""

    def __call__(self, tokens: Tokens) -> Outcome:
        return self.outcome(tokens, tokens.valid.float(), torch.zeros_like(tokens.valid))


@dataclass(frozen=True)
class Banded:
    """MIS and IcePop: a token, or response, counts only while its ratio lies in [low, high]."""

    name: str
    level: str
    low: float
    high: float
    weighted: bool
    needs_response_seeds = False

    def __post_init__(self) -> None:
        check(self.level in core.importance.LEVELS, "level", self.level, f"one of {', '.join(core.importance.LEVELS)}")
        check(0 <= self.low <= 1, "low", self.low, "in [0, 1]")
        check(self.high >= 1, "high", self.high, ">= 1")

    def __call__(self, tokens: Tokens) -> Outcome:
        factor = core.banded(
            tokens.log_ratio, tokens.valid, level=self.level, low=self.low, high=self.high, weighted=self.weighted
        )
        return of_factor(tokens, factor, by_token=self.level == "token")
