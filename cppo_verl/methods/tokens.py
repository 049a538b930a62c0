"""What a method is given, and what it gives back; the divergences D_t by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cppo_verl import core


class Measure(NamedTuple):
    """How a divergence D_t is computed: a function of ``core`` and what it needs to know."""

    function: Callable[..., Tensor]
    over_topk: bool
    """Whether it takes log pi and log mu at the rollout's K most likely tokens, besides those of the sampled token."""
    total_variation: bool = False
    """Whether it is a total variation, which the bounds of Section 3 are about."""


# By ``divergence.name``.
MEASURES = {
    "topk_tv": Measure(core.topk_tv, over_topk=True, total_variation=True),
    "topk_kl": Measure(core.topk_kl, over_topk=True),
    "binary_tv": Measure(core.binary_tv, over_topk=False, total_variation=True),
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
    """What a method decided; all ``[B, T]`` but ``delta_b``. Whatever is not None is dumped."""

    loss: Tensor
    """Per-token loss, differentiable in ``log_prob``."""
    gate: Tensor
    """float: factor on the token's gradient, 0 = masked, 1 = untouched."""
    token_cause: Tensor
    """bool: if this token is masked, a token threshold did it (otherwise the prefix or mean constraint)."""
    delta_b: Tensor | None = None
    """``[B]``: effective prefix budget, where the method has one."""
    weights: Tensor | None = None
    """``[B, T]``: w_t, where the method has them."""
    prefix_exceeded: Tensor | None = None
    """bool: S_t > delta + delta_b W_{t-1}, whatever the direction of the update; where the method has such a limit."""
    clipped: Tensor | None = None
    """bool: the importance weight was cut to a bound and the token keeps its gradient; where the method cuts any."""


class Rule(Protocol):
    """A method: a dataclass of settings that can be called."""

    @property
    def needs_response_seeds(self) -> bool: ...

    def __call__(self, tokens: Tokens) -> Outcome: ...


class FactorRule:
    """A method that is a factor on A_t grad log pi: a function of the core, its settings the fields."""

    factor: Callable[..., core.Factor]
    # Whether a threshold on the token itself lowers its gate; otherwise its response does.
    by_token = True

    def __call__(self, tokens: Tokens) -> Outcome:
        settings = {name: value for name, value in vars(self).items() if name != "name"}
        factor = type(self).factor(tokens.log_ratio, tokens.advantages, tokens.valid, **settings)
        return of_factor(tokens, factor, self.by_token)


def of_factor(tokens: Tokens, factor: core.Factor, by_token: bool) -> Outcome:
    """The outcome of such a rule."""
    loss = core.weighted_loss(tokens.log_prob, tokens.advantages, factor.weight)
    cause = tokens.valid & (factor.gate < 1) if by_token else torch.zeros_like(tokens.valid)
    return Outcome(loss, factor.gate, cause, clipped=factor.clipped)


def check(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raise ValueError, naming the setting, unless ``condition``."""
    if not condition:
        raise ValueError(f"method.{name} must be {wanted}; got {value}")


def check_positive(name: str, value: float) -> None:
    check(value > 0 and not math.isnan(value), name, value, "> 0")


def defined_on(method: object, settings: Mapping[str, Any]) -> str | None:
    """The only kind of divergence ("kl" or "tv") that the method goes with; None: any.

    Args:
        method: its class.
        settings: its fields by name.
    """
    if settings.get("allow_tv") is False:
        return "kl"
    return "tv" if getattr(method, "needs_total_variation", False) else None
