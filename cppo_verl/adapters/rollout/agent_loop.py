"""Rollout side: verl's single-turn agent loop with one sampling seed per response and Top-K log-probabilities.

Imported in every process that generates through ``actor_rollout_ref.model.external_lib``.
"""

from typing import Any

import torch
from pydantic import PrivateAttr
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK, TOPK_COLUMNS, TOPK_IDS
from cppo_verl.adapters.rollout.seeding import problem_key, response_seed


class TopKAgentLoopOutput(AgentLoopOutput):
    """verl's output, with the Top-K columns beside it: ``extra_fields`` would be shipped to the reward workers too."""

    _columns: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, output: AgentLoopOutput, columns: dict[str, torch.Tensor]) -> "TopKAgentLoopOutput":
        result = cls(**{name: getattr(output, name) for name in output.model_fields_set | {"extra_fields"}})
        result._columns = columns
        return result

    def as_dict(self) -> dict[str, Any]:
        """The fields of the trajectory; Top-K rows end where the response was cut."""
        fields = super().as_dict()
        length = len(fields["responses"])
        return fields | {name: rows[:length].clone() for name, rows in self._columns.items()}


@register("cppo_single_turn")
class TrustRegionAgentLoop(SingleTurnAgentLoop):
    """Adds a seed where ``run.seeded_rollout`` is set, and asks for the top K where the trainer does: in training."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        run, k = self.config.run, kwargs.get(TOPK, 0)
        sampling_params = dict(sampling_params)
        if run.seeded_rollout:
            problem = problem_key(kwargs["raw_prompt"])
            sampling_params["seed"] = response_seed(run.seed, kwargs["global_steps"], problem, kwargs["session_id"])
        if k:
            sampling_params["extra_args"] = {TOPK: k}
        output = await super().run(sampling_params, priority=priority, **kwargs)
        if not k:
            return output
        arrays = {name: output.extra_fields.pop(name, None) for name in TOPK_COLUMNS}
        columns = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        if not columns:
            if output.response_ids:
                raise RuntimeError(
                    "the vLLM server returned no Top-K log-probabilities; it is not cppo_verl's TopKServer"
                )
            # Aborted before the first token.
            columns = {TOPK_IDS: torch.empty(0, k, dtype=torch.int32), ROLLOUT_TOPK_LOG_PROB: torch.empty(0, k)}
        dtype = getattr(torch, self.config.divergence.log_prob_dtype)
        return TopKAgentLoopOutput.of(
            output, columns | {ROLLOUT_TOPK_LOG_PROB: columns[ROLLOUT_TOPK_LOG_PROB].to(dtype)}
        )
