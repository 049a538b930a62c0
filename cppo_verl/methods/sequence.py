"""Methods of one importance ratio for a whole response."""

from dataclasses import dataclass

import torch

from cppo_verl import core
from cppo_verl.methods.tokens import Outcome, Tokens, check, check_positive, of_factor


@dataclass(frozen=True)
class Gspo:
    """GSPO: the response's geometric mean ratio, clipped; a clipped response is masked as a whole."""

    name: str
    eps_low: float
    eps_high: float
    needs_response_seeds = False

    def __post_init__(self) -> None:
        check(0 <= self.eps_low <= 1, "eps_low", self.eps_low, "in [0, 1]")
        check(self.eps_high >= 0, "eps_high", self.eps_high, ">= 0")

    def __call__(self, tokens: Tokens) -> Outcome:
        factor = core.gspo(
            tokens.log_ratio, tokens.advantages, tokens.valid, eps_low=self.eps_low, eps_high=self.eps_high
        )
        return of_factor(tokens, factor, token_cause=torch.zeros_like(tokens.valid))


@dataclass(frozen=True)
class Gmpo:
    """GMPO: the geometric mean of token ratios that are clipped in log space; clipped tokens are masked."""

    name: str
    eps_low: float
    eps_high: float
    needs_response_seeds = False

    def __post_init__(self) -> None:
        check(self.eps_low >= 0, "eps_low", self.eps_low, ">= 0")
        check(self.eps_high >= 0, "eps_high", self.eps_high, ">= 0")

    def __call__(self, tokens: Tokens) -> Outcome:
        factor = core.gmpo(
            tokens.log_ratio, tokens.advantages, tokens.valid, eps_low=self.eps_low, eps_high=self.eps_high
        )
        return of_factor(tokens, factor, token_cause=factor.gate == 0)


@dataclass(frozen=True)
class Vespo:
    """VESPO: W^k exp(lambda (1 - W)) with W the product of the response's ratios; nothing is masked."""

    name: str
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float
    needs_response_seeds = False

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            check_positive(name, getattr(self, name))

    def __call__(self, tokens: Tokens) -> Outcome:
        factor = core.vespo(
            tokens.log_ratio,
            tokens.advantages,
            tokens.valid,
            k_pos=self.k_pos,
            lambda_pos=self.lambda_pos,
            k_neg=self.k_neg,
            lambda_neg=self.lambda_neg,
        )
        return of_factor(tokens, factor, token_cause=torch.zeros_like(tokens.valid))
