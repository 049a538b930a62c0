"""Methods whose gate fades instead of cutting."""

from dataclasses import dataclass

from cppo_verl import core
from cppo_verl.methods.tokens import FactorRule, Outcome, Tokens, check_positive, of_factor


@dataclass(frozen=True)
class Drpo:
    """DRPO: rho_t (1 - sign(A_t (rho_t - 1)) D_t / delta); beyond delta a token is pulled back."""

    name: str
    delta: float
    needs_response_seeds = False
    needs_total_variation = True

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)

    def __call__(self, tokens: Tokens) -> Outcome:
        factor = core.drpo(tokens.log_ratio, tokens.advantages, tokens.divergence, tokens.valid, delta=self.delta)
        return of_factor(tokens, factor, by_token=True)


@dataclass(frozen=True)
class Sapo(FactorRule):
    """SAPO: rho_t sech^2(tau (rho_t - 1) / 2), tau by the sign of the advantage."""

    name: str
    tau_pos: float
    tau_neg: float
    needs_response_seeds = False
    factor = staticmethod(core.sapo)

    def __post_init__(self) -> None:
        check_positive("tau_pos", self.tau_pos)
        check_positive("tau_neg", self.tau_neg)
