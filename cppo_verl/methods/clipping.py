"""Methods of the importance ratio, clipped by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cppo_verl import core
from cppo_verl.methods.tokens import FactorRule, Outcome, Tokens, check, check_positive


@dataclass(frozen=True)
class RatioClipping:
    """Settings of the methods that clip the importance ratio to [1 - eps_low, 1 + eps_high]."""

    name: str
    eps_low: float
    eps_high: float
    needs_response_seeds = False

    def __post_init__(self) -> None:
        check(0 <= self.eps_low <= 1, "eps_low", self.eps_low, "in [0, 1]")
        check(self.eps_high >= 0, "eps_high", self.eps_high, ">= 0")


class Grpo(RatioClipping):
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
        clipped = core.ppo_clipped(rho, tokens.advantages, 1.0 - self.eps_low, 1.0 + self.eps_high)
        return Outcome(loss, (~clipped).float(), clipped)


class Cispo(RatioClipping):
    """CISPO: every token keeps a gradient; its weight is clipped."""

    def __call__(self, tokens: Tokens) -> Outcome:
        loss = core.cispo_loss(
            tokens.log_prob,
            tokens.rollout_log_prob,
            tokens.advantages,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
        )
        rho = tokens.log_ratio.exp()
        return _unmasked(tokens, loss, (rho < 1.0 - self.eps_low) | (rho > 1.0 + self.eps_high))


class MinPro(RatioClipping):
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
        weight = (tokens.log_ratio + core.lowest_before(tokens.log_ratio, tokens.valid)).exp()
        return _unmasked(tokens, loss, (weight < 1.0 - self.eps_low) | (weight > 1.0 + self.eps_high))


@dataclass(frozen=True)
class Aspo(FactorRule, RatioClipping):
    """ASPO: the ratio of tokens with a positive advantage is flipped, 1 / rho; weights are capped."""

    cap_pos: float
    cap_neg: float
    factor = staticmethod(core.aspo)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.cap_pos >= 1, "cap_pos", self.cap_pos, ">= 1")
        check(self.cap_neg >= 1, "cap_neg", self.cap_neg, ">= 1")


@dataclass(frozen=True)
class Opsm(RatioClipping):
    """GRPO without the responses whose advantage is negative and whose mean log mu - log pi exceeds delta."""

    delta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("delta", self.delta)

    def __call__(self, tokens: Tokens) -> Outcome:
        clipped = Grpo(self.name, self.eps_low, self.eps_high)(tokens)
        keep = core.opsm_mask(tokens.log_ratio, tokens.advantages, tokens.valid, delta=self.delta)
        return Outcome(torch.where(keep, clipped.loss, 0.0), clipped.gate * keep, clipped.token_cause)


@dataclass(frozen=True)
class Fipo(FactorRule, RatioClipping):
    """FIPO: PPO with dual clip, advantages times the exponential of discounted future log ratios."""

    half_life: float
    low: float
    high: float
    safety: float
    dual_clip: float
    factor = staticmethod(core.fipo)

    def __call__(self, tokens: Tokens) -> Outcome:
        rho = tokens.log_ratio.exp()
        clipped = core.ppo_clipped(rho, tokens.advantages, 1.0 - self.eps_low, 1.0 + self.eps_high)
        beyond = (tokens.advantages < 0) & (rho > self.dual_clip)
        return super().__call__(tokens)._replace(token_cause=tokens.valid & (clipped | beyond))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("half_life", self.half_life)
        check(0 <= self.low <= 1, "low", self.low, "in [0, 1]")
        check(self.high >= 1, "high", self.high, ">= 1")
        check(self.safety >= 1, "safety", self.safety, ">= 1")
        check(self.dual_clip > 1, "dual_clip", self.dual_clip, "> 1")


def _unmasked(tokens: Tokens, loss: Tensor, cut: Tensor) -> Outcome:
    clipped = tokens.valid & cut
    return Outcome(loss, torch.ones_like(loss), torch.zeros_like(loss, dtype=torch.bool), clipped=clipped)
