"""Methods of one importance ratio for a whole response."""

from dataclasses import dataclass

from cppo_verl import core
from cppo_verl.methods.clipping import RatioClipping
from cppo_verl.methods.tokens import FactorRule, check, check_positive


class Gspo(FactorRule, RatioClipping):
    """GSPO: the response's geometric mean ratio, clipped; a clipped response is masked as a whole."""

    factor = staticmethod(core.gspo)
    by_token = False


@dataclass(frozen=True)
class Gmpo(FactorRule):
    """GMPO: the geometric mean of token ratios that are clipped in log space; clipped tokens are masked."""

    name: str
    eps_low: float
    eps_high: float
    needs_response_seeds = False
    factor = staticmethod(core.gmpo)

    def __post_init__(self) -> None:
        check(self.eps_low >= 0, "eps_low", self.eps_low, ">= 0")
        check(self.eps_high >= 0, "eps_high", self.eps_high, ">= 0")


@dataclass(frozen=True)
class Vespo(FactorRule):
    """VESPO: W^k exp(lambda (1 - W)) with W the product of the response's ratios; nothing is masked."""

    name: str
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float
    needs_response_seeds = False
    factor = staticmethod(core.vespo)
    by_token = False

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            check_positive(name, getattr(self, name))
