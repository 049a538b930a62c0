"""Several turns with tools: verl's tool agent loop, whose Top-K rows lie where the model's own tokens lie.

What a tool answers stands in the response, and ``response_mask`` is 0 there: such tokens have no divergence, no
position weight and no budget. verl aligns mask and log-probabilities of a response when it merges a turn or a tool's
answer, and may cut or insert tokens at the seam; here the numbers of the rows are aligned by the same call.

verl turns whatever goes wrong with a tool into a text for the model. Here it is counted as well, and a tool has a time
limit.
"""

import asyncio
from typing import Any

import numpy as np
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall
from verl.tools.schemas import ToolResponse
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from cppo_verl.adapters.columns import (
    ROLLOUT_TOPK_LOG_PROB,
    ROLLOUT_VERSION,
    TOOL_CALLS,
    TOOL_ERRORS,
    TOOL_LOOP,
    TOPK,
    TOPK_COLUMNS,
    TRUNCATED,
)
from cppo_verl.adapters.rollout.agent_loop import TopKAgentLoopOutput
from cppo_verl.adapters.rollout.seeding import piece_seed, problem_key, response_seed

# How the texts begin that verl gives a model whose call failed.
_FAILURES = ("Error executing tool '", "Unknown function '", "Invalid JSON in arguments for '")


class _Turns:
    """Stands for the client of one response and keeps what the server said of each turn."""

    def __init__(self, client: LLMServerClient) -> None:
        self._client = client
        self.outputs: list[TokenOutput] = []

    async def generate(self, *, sampling_params: dict[str, Any], **request: Any) -> TokenOutput:
        if self.outputs and sampling_params.get("seed") is not None:
            # Of a turn of its own; the pieces of an interrupted turn have seeds made from it.
            seed = piece_seed(sampling_params["seed"], -len(self.outputs))
            sampling_params = sampling_params | {"seed": seed}
        output = await self._client.generate(sampling_params=sampling_params, **request)
        self.outputs.append(output)
        return output

    def numbers(self) -> list[float]:
        """The rows of the last turn, numbered over all turns, from 1."""
        tokens = [len(output.token_ids) for output in self.outputs]
        return [float(sum(tokens[:-1]) + number + 1) for number in range(tokens[-1])]

    def columns(self) -> dict[str, np.ndarray]:
        """Our columns over the tokens of all turns; those that every turn with a token has."""
        spoken = [output.extra_fields for output in self.outputs if len(output.token_ids)]
        names = (name for name in (*TOPK_COLUMNS, ROLLOUT_VERSION) if all(name in fields for fields in spoken))
        return {name: np.concatenate([fields[name] for fields in spoken]) for name in names if spoken}


@register(TOOL_LOOP)
class TrustRegionToolLoop(ToolAgentLoop):
    """One instance is one response, as verl makes them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turns = _Turns(vars(self)["server_manager"])
        self.server_manager = self._turns
        # For each token of the response the number of its row, 0 for none; and the same before the last tool answered.
        self._rows: list[float] = []
        self._rows_before: list[float] = []
        self._counts = {TOOL_CALLS: 0, TOOL_ERRORS: 0}

    async def ct_merge_assistant_token(self, *args: Any, **kwargs: Any) -> Any:
        merged = await super().ct_merge_assistant_token(*args, **kwargs)
        _, self._rows = self._aligned(merged[0], self._turns.numbers())
        return merged

    async def ct_merge_context_msg(self, *args: Any, **kwargs: Any) -> Any:
        merged = await super().ct_merge_context_msg(*args, **kwargs)
        self._rows_before = self._rows
        _, self._rows = self._aligned(merged[0])
        return merged

    def _aligned(self, merge: Any, numbers: list[float] | None = None) -> tuple[list[int], list[float]]:
        mask = [int(row > 0) for row in self._rows]
        return self.continuous_token_builder.align_response_metadata(
            merge, mask, self._rows, assistant_logprobs=numbers
        )

    async def _call_tool(
        self, tool_call: FunctionCall, tools_kwargs: dict[str, Any], agent_data: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        limit = self.config.run.tool_timeout
        self._counts[TOOL_CALLS] += 1
        try:
            answer = await asyncio.wait_for(super()._call_tool(tool_call, tools_kwargs, agent_data), limit)
        except asyncio.TimeoutError:
            late = f"Error executing tool '{tool_call.name}': no answer within {limit} seconds"
            answer = ToolResponse(text=late), 0.0, {}
        if (answer[0].text or "").startswith(_FAILURES):
            self._counts[TOOL_ERRORS] += 1
        return answer

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        run, k = self.config.run, kwargs.get(TOPK, 0)
        sampling_params = dict(sampling_params)
        if run.seeded_rollout:
            problem = problem_key(kwargs["raw_prompt"])
            sampling_params["seed"] = response_seed(run.seed, kwargs["global_steps"], problem, kwargs["session_id"])
        if k:
            sampling_params["extra_args"] = {TOPK: k}
        output = await super().run(sampling_params, priority=priority, **kwargs)
        for name in (*TOPK_COLUMNS, ROLLOUT_VERSION):
            output.extra_fields.pop(name, None)
        last = self._turns.outputs[-1].extra_fields
        output.extra_fields |= self._counts
        output.extra_fields[TRUNCATED] = bool(last.get(TRUNCATED)) or len(output.response_ids) >= self.response_length
        columns = self._columns(output) if TOPK in kwargs else {}
        if k and len(columns) < len(TOPK_COLUMNS):
            raise RuntimeError("the vLLM server returned no Top-K log-probabilities; it is not cppo_verl's TopKServer")
        if k:
            dtype = getattr(torch, self.config.divergence.log_prob_dtype)
            columns[ROLLOUT_TOPK_LOG_PROB] = columns[ROLLOUT_TOPK_LOG_PROB].to(dtype)
        return TopKAgentLoopOutput.of(output, columns) if columns else output

    def _columns(self, output: AgentLoopOutput) -> dict[str, torch.Tensor]:
        """A row for each token of the response; zeros, as in padding, where the model did not speak."""
        mask = [bool(own) for own in output.response_mask]
        # verl throws a tool's answer away that would make the response too long, with what it cut for it.
        kept = (rows[: len(mask)] for rows in (self._rows, self._rows_before))
        rows = next((rows for rows in kept if [row > 0 for row in rows] == mask), None)
        if rows is None:
            raise RuntimeError(f"no row for each of the {sum(mask)} tokens that the model spoke in a response")
        place, own = np.array(rows, dtype=np.int64) - 1, np.array(mask, dtype=bool)
        columns = {}
        for name, spoken in self._turns.columns().items():
            column = np.zeros((len(mask), *spoken.shape[1:]), dtype=spoken.dtype)
            column[own] = spoken[place[own]]
            columns[name] = torch.from_numpy(column)
        return columns
