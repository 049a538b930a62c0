"""The one loss function that serves every method inside verl's actor."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, kl_penalty
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.padding import no_padding_2_padding

from cppo_verl.adapters.actor.token_statistics import TokenStatistics
from cppo_verl.adapters.actor.topk import TopK, TopKLogits
from cppo_verl.adapters.columns import (
    DUMP_DIR,
    INSPECTED,
    POLICY_VERSION,
    RESPONSE_SEEDS,
    ROLLOUT_VERSION,
    VERDICT,
)
from cppo_verl.core.checks import require_not_nan
from cppo_verl.methods import MEASURES, Outcome, Tokens


@dataclass
class TrustRegionConfig(PolicyLossConfig):
    """verl's policy-loss node with the ``method`` object and the ``divergence`` settings (see configs/)."""

    method: Any = None
    divergence: Any = None


class TrustRegionLoss:
    """Called for each micro-batch of whole responses: divergence, method, reduction, statistics.

    Where the divergence looks at the top K tokens, verl's engine first calls it with the micro-batch's logits.
    verl pads a micro-batch to its own longest response, so lengths, prefix sums and quantiles all come from the mask.
    """

    def __init__(self, config: ActorConfig) -> None:
        self.config = config
        self.method = config.policy_loss.method
        self.measure = MEASURES[config.policy_loss.divergence["name"]]
        self._topk_logits = TopKLogits()
        self.begin_update()

    @property
    def needs_logits(self) -> bool:
        return self.measure.over_topk

    def begin_update(self) -> None:
        """Forget the last step's statistics; a step is all minibatches between two weight updates of the servers."""
        self.statistics = TokenStatistics(self.measure.total_variation)
        self.minibatch = -1
        self._microbatch = 0

    def begin_minibatch(self) -> None:
        self.minibatch += 1
        self._microbatch = 0

    def __call__(
        self,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict | None = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
        data_format: str | None = None,
        temperature: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]] | dict[str, Tensor]:
        """verl's loss signature. Returns the scalar to back-propagate; metrics are collected in ``statistics``.

        With ``student_logits`` it is verl's logits hook: nothing is returned for verl to carry along. ``temperature``:
        what each row of the logits is still to be divided by.
        """
        assert data is not None
        if student_logits is not None:
            self._topk_logits.collect(student_logits, data, data_format, temperature)
            return {}
        assert model_output is not None
        entropy = model_output.get("entropy")
        if entropy is not None:
            entropy = no_padding_2_padding(entropy, data)
        tokens, topk = self._tokens(no_padding_2_padding(model_output["log_probs"], data), data)
        outcome = self.method(tokens)
        loss = self._reduce(outcome.loss, tokens.valid, data)
        loss = loss + self._verl_terms(tokens, entropy, data)
        detached = None if entropy is None else entropy.detach()
        age = _age(data)
        self.statistics.add(tokens, outcome, detached, first_minibatch=self.minibatch <= 0, age=age)
        self._dump(tokens, outcome, topk, age, data)
        self._microbatch += 1
        return loss, {}

    def _tokens(self, log_prob: Tensor, data: TensorDict) -> tuple[Tokens, TopK | None]:
        if log_prob.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"log pi arrived in {log_prob.dtype}: ratios and divergences would carry its rounding (docs/topk.md)"
            )
        padded = data.select("response_mask", "loss_mask", "rollout_log_probs", "advantages").to_padded_tensor()
        rollout_log_prob = padded["rollout_log_probs"].float()
        seeds = _column(data, RESPONSE_SEEDS)
        # The trainer clears loss_mask for skipped groups and leaves response_mask, which verl's own metrics read.
        valid = padded["response_mask"].bool() & padded["loss_mask"].bool()
        advantages = padded["advantages"].float()
        # The one value check of a micro-batch: a NaN divergence would compare as "not exceeded" and pass every mask.
        require_not_nan(valid, log_prob=log_prob, rollout_log_prob=rollout_log_prob, advantages=advantages)
        current, topk = log_prob.detach(), None
        if self.needs_logits:
            topk = self._topk_logits.finish(current, rollout_log_prob, padded["response_mask"].bool(), data)
            divergence = self.measure.function(
                current, rollout_log_prob, topk.topk_log_prob, topk.rollout_topk_log_prob, topk.sampled_in_topk
            )
        else:
            divergence = self.measure.function(current, rollout_log_prob)
        return Tokens(log_prob.float(), rollout_log_prob, advantages, valid, divergence, seeds), topk

    def _reduce(self, values: Tensor, mask: Tensor, data: TensorDict) -> Tensor:
        return agg_loss(
            loss_mat=values,
            loss_mask=mask,
            loss_agg_mode=self.config.loss_agg_mode,
            dp_size=data["dp_size"],
            # A minibatch of skipped groups only has no token to average over; its loss is 0, not 0/0.
            batch_num_tokens=max(data["batch_num_tokens"], 1),
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=self.config.loss_scale_factor,
        )

    def _verl_terms(self, tokens: Tokens, entropy: Tensor | None, data: TensorDict) -> Tensor | float:
        """verl's entropy bonus and KL-to-reference term; neither is in the paper, both are off by default."""
        term: Tensor | float = 0.0
        if entropy is not None and self.config.entropy_coeff:
            term = term - self.config.entropy_coeff * self._reduce(entropy, tokens.valid, data)
        if self.config.use_kl_loss:
            reference = data.select("ref_log_prob").to_padded_tensor()["ref_log_prob"]
            kl = kl_penalty(logprob=tokens.log_prob, ref_logprob=reference, kl_penalty=self.config.kl_loss_type)
            term = term + self.config.kl_loss_coef * self._reduce(kl, tokens.valid, data)
        return term

    def _dump(self, tokens: Tokens, outcome: Outcome, topk: TopK | None, age: Tensor | None, data: TensorDict) -> None:
        """Write this micro-batch's tensors (``run.dump_steps``): one file per rank, minibatch and micro-batch.

        Of a small dump (``run.inspect_every``) the rows that the trainer has chosen, without the padding that is left.
        """
        folder = tu.get_non_tensor_data(data, key=DUMP_DIR, default=None)
        kept = _column(data, INSPECTED)
        if not folder or (kept is not None and not kept.any()):
            return
        fields = data.select("prompts", "responses").to_padded_tensor(0)
        tensors = tokens._asdict() | outcome._asdict()
        tensors["response_mask"] = tensors.pop("valid")  # the name in the files
        tensors["age"] = age
        tensors["acc"] = _column(data, VERDICT)
        if topk is not None:
            tensors |= topk._asdict() | {"topk_ids": topk.topk_ids.int()}
            del tensors["sampled_in_topk"]
        tensors |= {"prompts": fields["prompts"], "responses": fields["responses"]}
        content = {name: value.detach() for name, value in tensors.items() if value is not None}
        if kept is not None:
            rows = kept.bool()
            widths = {name: int(data[name].offsets().diff()[rows].max()) for name in ("prompts", "responses")}
            content = {name: _narrowed(value[rows], widths, name) for name, value in content.items()}
        content = {name: value.cpu() for name, value in content.items()}
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        os.makedirs(folder, exist_ok=True)
        torch.save(content, f"{folder}/minibatch{self.minibatch}_rank{rank}_micro{self._microbatch}.pt")


def _column(data: TensorDict, name: str) -> Tensor | None:
    """A column of one value a response, ``[B]``; None where the batch has none."""
    values = data.get(name, None)
    return None if values is None else (values.values() if values.is_nested else values).reshape(-1)


def _narrowed(rows: Tensor, widths: dict[str, int], name: str) -> Tensor:
    """A copy of ``rows``, of the tokens up to the longest of them."""
    return (rows if rows.dim() == 1 else rows[:, : widths["prompts" if name == "prompts" else "responses"]]).clone()


def _age(data: TensorDict) -> Tensor | None:
    """Weight updates since those that sampled each token, int ``[B, T]``; None in lockstep."""
    if ROLLOUT_VERSION not in data:
        return None
    now = tu.get_non_tensor_data(data, key=POLICY_VERSION, default=0)
    return now - data.select(ROLLOUT_VERSION).to_padded_tensor()[ROLLOUT_VERSION]
