"""Rollout side: verl's single-turn agent loop with one sampling seed per response.

Imported in every process that generates through ``actor_rollout_ref.model.external_lib``.
"""

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from cppo_verl.adapters.seeding import problem_key, response_seed


@register("cppo_single_turn")
class SeededSingleTurnAgentLoop(SingleTurnAgentLoop):
    """Adds a seed to the sampling parameters when ``run.seeded_rollout`` is set; otherwise verl's loop unchanged."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        run = self.config.run
        if run.seeded_rollout:
            problem = problem_key(kwargs["raw_prompt"])
            seed = response_seed(run.seed, kwargs["global_steps"], problem, kwargs["session_id"])
            sampling_params = {**sampling_params, "seed": seed}
        return await super().run(sampling_params, priority=priority, **kwargs)
