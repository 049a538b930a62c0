"""verl's agent loop workers without what they do anew for every response: ``agent.agent_loop_manager_class``.

verl makes an agent loop by Hydra for each response, renders its prompt, and hands it on by a Ray call to a reward
worker and a put into TransferQueue. Here the loop is made once and a prompt rendered once for its group, and responses
that finish while a call is under way go on together in the next one. What is stored is the same, field by field.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
import verl.trainer.ppo.v1.agent_loop_tq as agent_loop_tq
from omegaconf import DictConfig
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from tensordict import TensorDict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.protocol import DataProto
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.model import compute_position_id_with_mask
from verl.utils.profiler import simple_timer
from verl.utils.rollout_trace import rollout_trace_attr
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import LLMServerClient

from cppo_verl.adapters.columns import AGENT_LOOP
from cppo_verl.adapters.rollout.agent_loop import TrustRegionAgentLoop
from cppo_verl.adapters.rollout.batching import Batched
from cppo_verl.run import progress

# A response on its way to a reward worker: what was generated, and its row of the data set.
Ungraded = tuple[AgentLoopOutput, dict[str, Any]]

# The arguments of a put: partition, keys, fields, tags.
Put = tuple[str, list[str], list[dict[str, Any]], list[dict[str, Any]]]


class QueueInBatches:
    """What verl's worker sees as ``transfer_queue``: its own, but puts of whole responses go together."""

    def __init__(self) -> None:
        self._put = Batched(self._put_all)

    def __getattr__(self, name: str) -> Any:
        return getattr(tq, name)

    async def async_kv_batch_put(
        self, keys: list[str], partition_id: str, fields: list[dict[str, Any]], tags: list[dict[str, Any]]
    ) -> None:
        await self._put((partition_id, keys, fields, tags))

    async def _put_all(self, puts: list[Put]) -> list[None]:
        # A column must be there for all rows of a put: an aborted response has no log-probabilities.
        together: dict[Any, list[tuple[str, dict[str, Any], dict[str, Any]]]] = defaultdict(list)
        for partition_id, keys, fields, tags in puts:
            for key, field, tag in zip(keys, fields, tags, strict=True):
                together[partition_id, frozenset(field)].append((key, field, tag))
        for (partition_id, _), rows in together.items():
            keys, fields, tags = map(list, zip(*rows, strict=True))
            table = list_of_dict_to_tensordict(fields)
            with progress.doing("queue"):
                await tq.async_kv_batch_put(keys=keys, fields=table, tags=tags, partition_id=partition_id)
        return [None] * len(puts)


class TrustRegionAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
    """One agent loop for all responses; grading and storing in batches. Other agent loops than ours: as verl does."""

    def __init__(self, config: DictConfig, llm_client: LLMServerClient | None, *args: Any, **kwargs: Any) -> None:
        # verl writes on the client; where it is still to come, what it wrote is handed on.
        progress.report("agent loop worker")
        self._in_place_of_client = SimpleNamespace()
        super().__init__(config, llm_client or self._in_place_of_client, *args, **kwargs)
        # The two names by which verl's worker stores a response; this process has no other worker.
        agent_loop_tq.tq = QueueInBatches()
        agent_loop_tq.list_of_dict_to_tensordict = list
        self._graders = [Batched(_grading(worker)) for worker in self.reward_loop_worker_handles or ()]
        if llm_client is not None:
            self.connect(llm_client)

    def connect(self, llm_client: LLMServerClient) -> None:
        """Generate with the servers that ``llm_client`` reaches."""
        vars(llm_client).update(vars(self._in_place_of_client))
        self.llm_client = llm_client
        self._loop_of_all = TrustRegionAgentLoop(
            trainer_config=DictConfigWrap(config=self.config),
            server_manager=self.llm_client,
            tokenizer=self.tokenizer,
            processor=self.processor,
            hf_model_type=self.hf_model_type,
            dataset_cls=self.dataset_cls,
            data_config=DictConfigWrap(self.config.data),
        )

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> None:
        if agent_name != AGENT_LOOP:
            await super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs)
            return
        with rollout_trace_attr(**trajectory, name="agent_loop", trace=trace):
            output = await self._loop_of_all.run(sampling_params, **kwargs)
            await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        output = outputs[-1]
        if len(outputs) > 1 or self.processor is not None or not self._graders or output.reward_score is not None:
            await super()._compute_score(outputs, kwargs)
            return
        timing: dict[str, float] = {}
        with simple_timer("compute_score", timing):
            result = await random.choice(self._graders)((output, kwargs))
        output.reward_score = result["reward_score"]
        output.extra_fields["reward_extra_info"] = result["reward_extra_info"]
        output.metrics.compute_score = timing["compute_score"]


def _grading(worker: ActorHandle) -> Callable[[list[Ungraded]], Any]:
    """How a reward worker is asked for the rewards of several responses."""

    async def grade(responses: list[Ungraded]) -> list[dict[str, Any] | BaseException]:
        with progress.doing("grading"):
            return await graded(responses)

    async def graded(responses: list[Ungraded]) -> list[dict[str, Any] | BaseException]:
        # A batch has one set of columns: in the asynchronous modes training and validation are graded at once.
        alike: dict[frozenset[str], list[int]] = defaultdict(list)
        for place, (_, row) in enumerate(responses):
            alike[frozenset(row)].append(place)
        results: dict[int, dict[str, Any] | BaseException] = {}
        for places in alike.values():
            results |= zip(places, await graded_alike([responses[place] for place in places]), strict=True)
        return [results[place] for place in range(len(responses))]

    async def graded_alike(responses: list[Ungraded]) -> list[dict[str, Any] | BaseException]:
        try:
            return await worker.compute_score_batch.remote(reward_inputs(responses))
        except RayTaskError:
            # One of them has no reward; the others are not to suffer for it.
            alone = (worker.compute_score.remote(reward_inputs([response])) for response in responses)
            return await asyncio.gather(*alone, return_exceptions=True)

    return grade


def reward_inputs(responses: list[Ungraded]) -> DataProto:
    """What verl's reward managers read, of each response as verl itself would send it alone; padded with 0.

    Of a response with calls of tools the model's own tokens only, where verl sends the tools' answers as well.
    """

    def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        tokens = [torch.tensor(row, dtype=torch.int64) for row in rows]
        mask = [torch.ones_like(row) for row in tokens]
        return tuple(pad_sequence(column, batch_first=True, padding_side=side) for column in (tokens, mask))  # type: ignore[return-value]

    outputs, rows = zip(*responses, strict=True)
    prompts, prompt_mask = padded([output.prompt_ids for output in outputs], "left")
    written = [_written(output) for output in outputs]
    answers, answer_mask = padded(written, "right")
    mask = torch.cat([prompt_mask, answer_mask], dim=1)
    tensors = {
        "prompts": prompts,
        "responses": answers,
        "attention_mask": mask,
        "input_ids": torch.cat([prompts, answers], dim=1),
        "position_ids": compute_position_id_with_mask(mask),
    }
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {
        "__num_turns__": [output.num_turns for output in outputs],
        "tool_extra_fields": [output.extra_fields for output in outputs],
        "prompt_len": [len(output.prompt_ids) for output in outputs],
        "response_len": [len(tokens) for tokens in written],
    }
    return DataProto(
        batch=TensorDict(tensors, batch_size=len(outputs)),
        non_tensor_batch={name: _objects(column) for name, column in columns.items()},
    )


def _written(output: AgentLoopOutput) -> list[int]:
    """The tokens of the model itself: what a tool answered is no answer of the model's."""
    return [token for token, own in zip(output.response_ids, output.response_mask, strict=True) if own]


def _objects(column: list[Any]) -> np.ndarray:
    array = np.empty(len(column), dtype=object)
    array[:] = column
    return array


class TrustRegionAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with workers of :class:`TrustRegionAgentLoopWorker`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(TrustRegionAgentLoopWorker)

    def connect(self, llm_client: LLMServerClient) -> None:
        """Tell workers that were started before the servers how to reach them."""
        self.llm_client = llm_client
        ray.get([worker.connect.remote(llm_client) for worker in self.agent_loop_workers])
