"""Rollout side: verl's single-turn agent loop with one sampling seed per response and Top-K log-probabilities.

Imported in every process that generates through ``actor_rollout_ref.model.external_lib``.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import PrivateAttr
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from cppo_verl.adapters.columns import AGENT_LOOP, ROLLOUT_TOPK_LOG_PROB, ROLLOUT_VERSION, TOPK, TOPK_COLUMNS, TOPK_IDS
from cppo_verl.adapters.rollout.seeding import problem_key, response_seed

# Rendered prompts a worker remembers: some ten megabytes.
_KEPT_PROMPTS = 10_000


class TopKAgentLoopOutput(AgentLoopOutput):
    """verl's output, with our columns beside it: ``extra_fields`` would be shipped to the reward workers too."""

    _columns: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, output: AgentLoopOutput, columns: dict[str, torch.Tensor]) -> "TopKAgentLoopOutput":
        # Checked when it was made; each check goes through every token.
        result = cls.model_construct(
            **{name: getattr(output, name) for name in output.model_fields_set | {"extra_fields"}}
        )
        result._columns = columns
        return result

    def as_dict(self) -> dict[str, Any]:
        """The fields of the trajectory; our rows end where the response was cut."""
        fields = super().as_dict()
        length = len(fields["responses"])
        return fields | {name: rows[:length].clone() for name, rows in self._columns.items()}


class _InPlace:
    """An event loop's ``run_in_executor`` without a thread: a cached prompt and a joined list are not worth one."""

    async def run_in_executor(self, _: None, function: Callable[[], Any]) -> Any:
        return function()


@register(AGENT_LOOP)
class TrustRegionAgentLoop(SingleTurnAgentLoop):
    """Adds a seed where ``run.seeded_rollout`` is set, and asks for the top K where the trainer does: in training.

    One instance serves all responses of a worker: it keeps nothing of them but the rendered prompts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Looked up for every response; a lookup in the composed configuration takes longer than all else in run().
        self._seeded, self._run_seed = self.config.run.seeded_rollout, self.config.run.seed
        divergence = self.config.divergence
        self._log_prob_dtype = getattr(torch, divergence.log_prob_dtype) if divergence.k else None
        self.loop = _InPlace()
        self._prompts: dict[str, list[int]] = {}

    async def ct_build_initial_tokens(self, messages: list[dict[str, Any]], **media: Any) -> list[int]:
        """The rendered prompt; a group of responses has one, and an epoch later it comes again."""
        if any(value for value in media.values()):
            return await super().ct_build_initial_tokens(messages, **media)
        key = problem_key(messages)
        if key not in self._prompts:
            if len(self._prompts) >= _KEPT_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = await super().ct_build_initial_tokens(messages, **media)
        return list(self._prompts[key])

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        k = kwargs.get(TOPK, 0)
        sampling_params = dict(sampling_params)
        if self._seeded:
            problem = problem_key(kwargs["raw_prompt"])
            sampling_params["seed"] = response_seed(
                self._run_seed, kwargs["global_steps"], problem, kwargs["session_id"]
            )
        if k:
            sampling_params["extra_args"] = {TOPK: k}
        output = await super().run(sampling_params, priority=priority, **kwargs)
        arrays = {name: output.extra_fields.pop(name, None) for name in (*TOPK_COLUMNS, ROLLOUT_VERSION)}
        columns = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        if k and TOPK_IDS not in columns:
            if output.response_ids:
                raise RuntimeError(
                    "the vLLM server returned no Top-K log-probabilities; it is not cppo_verl's TopKServer"
                )
            # Aborted before the first token.
            columns |= {TOPK_IDS: torch.empty(0, k, dtype=torch.int32), ROLLOUT_TOPK_LOG_PROB: torch.empty(0, k)}
        if k:
            columns[ROLLOUT_TOPK_LOG_PROB] = columns[ROLLOUT_TOPK_LOG_PROB].to(self._log_prob_dtype)
        trained = TOPK in kwargs
        return TopKAgentLoopOutput.of(output, columns) if columns and trained else output
