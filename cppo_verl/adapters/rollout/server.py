"""vLLM's side of the Top-K divergence: verl's rollout server, which also returns the K most likely tokens.

verl asks vLLM for the sampled token's log-probability only. A request that carries ``TOPK`` in its ``extra_args`` gets
K log-probabilities a token, of the distribution it was sampled from; they are kept as arrays from the moment they leave
the engine, instead of vLLM's dictionary, object and detokenized string for each of them.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, overload

import numpy as np
import ray
import vllm.v1.engine.output_processor as output_processor
from ray.actor import ActorHandle
from verl.plugin.platform import get_platform
from verl.single_controller.ray import RayClassWithInitArgs
from verl.workers.rollout.replica import CONTROL_METHOD_CONCURRENCY, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK, TOPK_IDS, TRUNCATED
from cppo_verl.adapters.rollout.sending import WatchedReceiver
from cppo_verl.run import progress


class TopKLogprobs(Sequence[dict[int, Any]]):
    """Log-probabilities of one request: the sampled tokens' for verl, the K most likely ones' as growing arrays.

    Behaves as vLLM's own list, of which verl reads ``logprobs[token][token_id].logprob``.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._tokens: list[int] = []
        self._sampled: list[float] = []
        self._topk_ids = np.empty((64, k), dtype=np.int32)
        self._rollout_topk_log_prob = np.empty((64, k), dtype=np.float32)

    def append(self, token_ids: np.ndarray, log_probs: np.ndarray) -> None:
        """Add tokens. ``[n, >= K + 1]``: the sampled token first, then the most likely ones in order."""
        start, end = len(self._tokens), len(self._tokens) + len(token_ids)
        if end > len(self._topk_ids):
            size = max(2 * len(self._topk_ids), end)
            self._topk_ids = _grown(self._topk_ids, size)
            self._rollout_topk_log_prob = _grown(self._rollout_topk_log_prob, size)
        self._topk_ids[start:end] = token_ids[:, 1 : self.k + 1]
        self._rollout_topk_log_prob[start:end] = log_probs[:, 1 : self.k + 1]
        self._tokens += token_ids[:, 0].tolist()
        self._sampled += log_probs[:, 0].tolist()

    def columns(self, length: int) -> dict[str, np.ndarray]:
        """Copies of the first ``length`` rows, ``[length, K]``: int32 ids and float32 log-probabilities."""
        return {
            TOPK_IDS: self._topk_ids[:length].copy(),
            ROLLOUT_TOPK_LOG_PROB: self._rollout_topk_log_prob[:length].copy(),
        }

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> dict[int, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[int, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return {self._tokens[index]: SimpleNamespace(logprob=self._sampled[index])}

    def __iter__(self) -> Iterator[dict[int, Any]]:
        return (self[number] for number in range(len(self)))


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    grown = np.empty((size, array.shape[1]), dtype=array.dtype)
    grown[: len(array)] = array
    return grown


class TopKLogprobsProcessor(LogprobsProcessor):
    """vLLM's per-request collector of log-probabilities: of the sampled tokens and, with ``TOPK``, of the K likeliest.

    Requests that ask for something else are vLLM's own business.
    """

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: Any) -> LogprobsProcessor:
        params = request.sampling_params
        k = (params.extra_args or {}).get(TOPK)
        if k is None and params.num_logprobs == 0 and params.prompt_logprobs is None:
            k = 0  # the sampled token's alone
        if k is None:
            return LogprobsProcessor.from_new_request(tokenizer, request)
        return cls(
            tokenizer=None,
            logprobs=TopKLogprobs(k),
            prompt_logprobs=None,
            cumulative_logprob=0.0,
            num_logprobs=k,
            num_prompt_logprobs=None,
        )

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        self.logprobs.append(np.asarray(logprobs_lists[0]), np.asarray(logprobs_lists[1]))
        self.cumulative_logprob += float(np.sum(np.asarray(logprobs_lists[1])[:, 0]))


class TopKServer(vLLMHttpServer):
    """verl's vLLM server, which says more in an output's ``extra_fields``: whether the response was cut off at its
    longest length, and the Top-K columns where asked for. The engine makes one output a response, without text.

    Without settings it is a process that has imported what a server needs, and waits for :meth:`begin`.
    """

    def __init__(self, **settings: Any) -> None:
        if settings:
            self.begin(**settings)

    def begin(self, **settings: Any) -> None:
        """What verl makes a server with; vLLM's own sockets are on Ray's address of the node, as the server's is."""
        progress.report("vLLM server")
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address().strip("[]"))
        super().__init__(**settings)

    async def run_server(self, args: argparse.Namespace) -> None:
        # The engine's output handler looks this name up for every new request of this process.
        output_processor.LogprobsProcessor = TopKLogprobsProcessor
        await super().run_server(args)
        self._finished: dict[str, dict[str, Any]] = {}
        self._engine_generate = self.engine.generate
        self.engine.generate = self._generate_with_topk

    async def _generate_with_topk(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        if request_id not in self._finished:  # not verl's: one of vLLM's HTTP endpoints
            async for output in self._engine_generate(prompt, sampling_params, request_id, *args, **kwargs):
                yield output
            return
        k = (sampling_params.extra_args or {}).get(TOPK)
        if k is not None:
            sampling_params.logprobs = k
        if not sampling_params.stop:
            sampling_params.detokenize = False  # verl takes the tokens
        # verl reads the last output; those before it cost a copy of the response for every token.
        sampling_params.output_kind = RequestOutputKind.FINAL_ONLY
        outputs = self._engine_generate(prompt, sampling_params, request_id, *args, **kwargs)
        first = asyncio.ensure_future(anext(outputs))
        output = None
        try:
            # At a first output verl counts a request as one that a weight update can interrupt.
            await self._accepted(request_id, first)
            yield None
            output = await first
            yield output
            async for output in outputs:
                yield output
        finally:
            first.cancel()
        if output is not None and output.outputs:
            completion = output.outputs[0]
            fields: dict[str, Any] = {TRUNCATED: completion.finish_reason == "length"}
            if k is not None:
                fields |= completion.logprobs.columns(len(completion.token_ids))
            self._finished[request_id] = fields

    async def _accepted(self, request_id: str, first: asyncio.Future[Any]) -> None:
        """Wait until the engine has the request (or is done with it)."""
        pause = 0.0
        while not first.done() and request_id not in self.engine.output_processor.external_req_ids:
            await asyncio.sleep(pause)
            pause = 0.001

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **request: Any
    ) -> TokenOutput:
        self._finished[request_id] = {}
        try:
            with progress.doing("generation"):
                output = await super().generate(prompt_ids, sampling_params, request_id, **request)
        finally:
            fields = self._finished.pop(request_id, {})
        output.extra_fields.update(fields)
        return output


class TopKReplica(vLLMReplica):
    """verl's vLLM replica with :class:`TopKServer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):  # those are served by verl's own
            self.server_class = ServerClass.ahead or ray.remote(TopKServer)

    def get_ray_class_with_init_args(self) -> RayClassWithInitArgs:
        """Of the worker beside a server of its own."""
        worker = super().get_ray_class_with_init_args()
        worker.cls = ray.remote(WatchedReceiver)
        return worker


class ServerClass:
    """Stands for the actor class of vLLM servers where the first one's process has been started ahead.

    A server is made when the actor workers have loaded the model; importing vLLM takes as long and need not wait.
    """

    ahead: "ServerClass | None" = None

    def __init__(self, name: str, **options: Any) -> None:
        self._class = ray.remote(TopKServer)
        self._name, self._first = name, self._class.options(name=name, **options).remote()

    def options(self, *, name: str, **options: Any) -> Any:
        return self if name == self._name else self._class.options(name=name, **options)

    def remote(self, **settings: Any) -> ActorHandle:
        ray.get(self._first.begin.remote(**settings))
        return self._first


def start_ahead(max_num_seqs: int) -> None:
    """Start the process of the first vLLM server, on this machine, with the options that verl's replica 0 will give."""
    platform = get_platform()
    ServerClass.ahead = ServerClass(
        "vllm_server_0_0",
        runtime_env={
            "env_vars": dict.fromkeys(platform.ray_noset_envvars(), "1") | platform.rollout_env_vars(),
        },
        max_concurrency=max(1000, max_num_seqs + CONTROL_METHOD_CONCURRENCY),
    )
