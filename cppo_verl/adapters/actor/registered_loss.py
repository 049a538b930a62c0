"""A method behind the signature of verl's registered policy losses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss

from cppo_verl.methods import MEASURES, Tokens
from cppo_verl.methods.tokens import Rule


class RegisteredLoss:
    """Built when it is first called, in the process that trains."""

    def __init__(self, build: Callable[[], tuple[Rule, str]]) -> None:
        self._build = build
        self._built: tuple[Rule, str] | None = None

    @classmethod
    def register(cls, name: str, build: Callable[[], tuple[Rule, str]]) -> None:
        """For ``loss_mode=name``; where verl has a loss of its own of that name, ``cppo_verl.name``."""
        taken = name in POLICY_LOSS_REGISTRY and not isinstance(POLICY_LOSS_REGISTRY[name], cls)
        POLICY_LOSS_REGISTRY[f"cppo_verl.{name}" if taken else name] = cls(build)

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """verl's signature: (loss, metrics). ``old_log_prob``: the rollout's (``bypass_mode=true``).

        Raises:
            ValueError: verl was told to weigh the loss (``rollout_is``), which the method does by itself.
        """
        if rollout_is_weights is not None:
            raise ValueError("algorithm.rollout_correction.rollout_is: the method weighs by itself; set it to null")
        method, divergence = self._built = self._built or self._build()
        valid, rollout_log_prob = response_mask.bool(), old_log_prob.float()
        d = MEASURES[divergence].function(log_prob.detach(), rollout_log_prob)
        seeds = torch.zeros(len(valid), dtype=torch.int64)
        tokens = Tokens(log_prob.float(), rollout_log_prob, advantages.float(), valid, d, seeds)
        outcome = method(tokens)
        loss = agg_loss(outcome.loss, valid, loss_agg_mode, **config.global_batch_info)
        count = valid.sum().clamp_min(1)
        masked = valid & (outcome.gate < 1)
        metrics = {
            "trust_region/masked": masked.sum() / count,
            "trust_region/masked_by_token": (masked & outcome.token_cause).sum() / count,
            "divergence/mean": torch.where(valid, d, 0.0).sum() / count,
        }
        return loss, {name: value.item() for name, value in metrics.items()}
