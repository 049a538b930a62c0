"""Generation in a bare vLLM engine with no, one and many log-probabilities a token."""

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import vllm.v1.engine.output_processor as output_processor
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from cppo_verl.adapters.columns import TOPK
from cppo_verl.adapters.rollout.server import TopKLogprobsProcessor
from cppo_verl.bench.cells import Cell
from cppo_verl.bench.model import tiny_model
from cppo_verl.run.machine import ONE_PROCESS, has_gpu

VARIANTS = ("none", "K=0", "K=1", "K=20", "vLLM's K=20", "K=64")
_PROMPT_TOKENS = 16
_CPU: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "distributed_executor_backend": ONE_PROCESS,
}
_GPU: dict[str, Any] = {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}


def rollout(cell: Cell) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """A batch of responses of exactly so many tokens, by what is asked for with each token.

    "none": nothing; "K=0": the sampled token's log-probability; "K=20": ours; "vLLM's K=20": the same in vLLM's own
    objects. One output a response, and of ours no text, as the server asks for them.
    """
    engine = _engine(cell["vocabulary"], cell["responses"], _PROMPT_TOKENS + cell["tokens"])
    draw = random.Random(0)
    prompts = [[draw.randrange(7, 50) for _ in range(_PROMPT_TOKENS)] for _ in range(cell["responses"])]
    numbers = itertools.count()

    def generate(variant: str) -> None:
        for prompt in prompts:
            params = sampling_params(variant, cell["tokens"])
            engine.add_request(str(next(numbers)), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished and variant.startswith("K=") and variant != "K=0":
                    output.outputs[0].logprobs.columns(cell["tokens"])

    return {name: functools.partial(generate, name) for name in VARIANTS}, {}


def sampling_params(variant: str, tokens: int) -> SamplingParams:
    """vLLM's parameters of a request for ``tokens`` tokens."""
    k = None if variant == "none" else int(variant.partition("=")[2])
    ours = {TOPK: k} if k and variant.startswith("K=") else None
    return SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=k,
        extra_args=ours,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=variant.startswith("vLLM"),
    )


def _engine(vocabulary: int, responses: int, length: int) -> LLMEngine:
    """As configs/platform and verl's server set it up; all responses fit one batch."""
    # The server does the same; requests that are not ours get vLLM's own collector.
    output_processor.LogprobsProcessor = TopKLogprobsProcessor
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(tiny_model(vocabulary)),
            enable_prefix_caching=False,
            max_model_len=length,
            max_num_seqs=responses,
            max_num_batched_tokens=max(2048, responses * _PROMPT_TOKENS, length),
            max_logprobs=64,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            **(_GPU if has_gpu() else _CPU),
        )
    )
