"""Rollout side: verl's single-turn agent loop with one sampling seed per response and Top-K log-probabilities.

Imported in every process that generates through ``actor_rollout_ref.model.external_lib``.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import PrivateAttr
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from cppo_verl.adapters.seeding import problem_key, response_seed
from cppo_verl.adapters.topk import IDS, LOG_PROBS

# Key in a request's SamplingParams.extra_args: how many log-probabilities a token; and in the output's extra_fields.
TOP_K = "cppo_top_k"
ROLLOUT_TOPK = "cppo_rollout_topk"
# Key in the output's extra_fields: the response ended at its longest length.
TRUNCATED = "truncated"


class RolloutTopK(NamedTuple):
    """The K most likely tokens at every position of one response, as vLLM sampled it."""

    ids: np.ndarray
    """int32 ``[T, K]``."""
    log_probs: np.ndarray
    """float32 ``[T, K]``."""


class TopKAgentLoopOutput(AgentLoopOutput):
    """verl's output, with the Top-K arrays beside it: ``extra_fields`` would be shipped to the reward workers too."""

    _topk: RolloutTopK | None = PrivateAttr(default=None)
    _dtype: torch.dtype = PrivateAttr(default=torch.float32)

    @classmethod
    def of(cls, output: AgentLoopOutput, topk: RolloutTopK, dtype: torch.dtype) -> "TopKAgentLoopOutput":
        result = cls(**{name: getattr(output, name) for name in output.model_fields_set | {"extra_fields"}})
        result._topk, result._dtype = topk, dtype
        return result

    def as_dict(self) -> dict[str, Any]:
        """The fields of the trajectory; Top-K rows end where the response was cut."""
        fields = super().as_dict()
        if self._topk is not None:
            length = len(fields["responses"])
            fields[IDS] = torch.from_numpy(self._topk.ids[:length].copy())
            fields[LOG_PROBS] = torch.from_numpy(self._topk.log_probs[:length].copy()).to(self._dtype)
        return fields


@register("cppo_single_turn")
class TrustRegionAgentLoop(SingleTurnAgentLoop):
    """Adds a seed where ``run.seeded_rollout`` is set, and asks for the top K where the trainer does: in training."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        run, k = self.config.run, kwargs.get("divergence_k", 0)
        sampling_params = dict(sampling_params)
        if run.seeded_rollout:
            problem = problem_key(kwargs["raw_prompt"])
            sampling_params["seed"] = response_seed(run.seed, kwargs["global_steps"], problem, kwargs["session_id"])
        if k:
            sampling_params["extra_args"] = {TOP_K: k}
        output = await super().run(sampling_params, priority=priority, **kwargs)
        if not k:
            return output
        topk = output.extra_fields.pop(ROLLOUT_TOPK, None)
        if topk is None:
            if output.response_ids:
                raise RuntimeError(
                    "the vLLM server returned no Top-K log-probabilities; it is not cppo_verl's TopKServer"
                )
            # Aborted before the first token.
            topk = RolloutTopK(np.empty((0, k), dtype=np.int32), np.empty((0, k), dtype=np.float32))
        return TopKAgentLoopOutput.of(output, topk, getattr(torch, self.config.divergence.log_prob_dtype))
