"""A run's rollouts and validations beside vLLM's engine alone, on the same prompts with the same seeds and K.

    python scripts/side_by_side/bare_engine.py RUN [--rounds 5]

RUN: a folder of ``cppo train`` on a machine without an accelerator. The engine has the weights of the run's last
checkpoint: no Ray, no agent loop, no grading, no queue. Prints a table; a run's seconds include all of that. The
validation is the run's last, of the same weights, prompts and seeds; a rollout is of the first problems, beside the
run's second half of steps, whose responses are about as long.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import pandas as pd
import vllm.v1.engine.output_processor as output_processor
from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from cppo_verl.adapters.columns import TOPK
from cppo_verl.adapters.rollout.seeding import problem_key, response_seed
from cppo_verl.adapters.rollout.server import TopKLogprobsProcessor
from cppo_verl.checkpoint.export import hugging_face_folder
from cppo_verl.checkpoint.find import find
from cppo_verl.run.folder import read_config
from cppo_verl.run.log import read_lines, read_metrics
from cppo_verl.run.supervisor import process_environment


def engine_of(model: str, config: DictConfig) -> LLMEngine:
    """As verl's server sets it up for the run."""
    rollout = config.actor_rollout_ref.rollout
    output_processor.LogprobsProcessor = TopKLogprobsProcessor
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            dtype=rollout.dtype,
            enforce_eager=rollout.enforce_eager,
            enable_chunked_prefill=rollout.enable_chunked_prefill,
            enable_prefix_caching=rollout.enable_prefix_caching,
            max_model_len=rollout.max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            max_num_batched_tokens=rollout.max_num_batched_tokens,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            max_logprobs=max(config.divergence.k, 1),
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            distributed_executor_backend=rollout.engine_kwargs.vllm.get("distributed_executor_backend"),
        )
    )


def generate(
    engine: LLMEngine, prompts: list[tuple[str, list[int]]], n: int, k: int | None, config: DictConfig, step: int
) -> int:
    """``n`` responses to each prompt with the seeds of ``step``; the number of their tokens.

    k: None: no log-probability; 0: the sampled token's; else of the k most likely ones, as arrays.
    """
    rollout, names = config.actor_rollout_ref.rollout, iter(range(len(prompts) * n))
    for problem, ids in prompts:
        for sample in range(n):
            params = SamplingParams(
                max_tokens=config.data.max_response_length,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                seed=response_seed(config.run.seed, step, problem, sample),
                logprobs=k,
                extra_args={TOPK: k} if k else None,
                output_kind=RequestOutputKind.FINAL_ONLY,
                detokenize=False,
            )
            engine.add_request(str(next(names)), {"prompt_token_ids": ids}, params)
    tokens = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens += len(output.outputs[0].token_ids)
    return tokens


def prompts_of(file: str, count: int | None, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """(key, token ids) of the first ``count`` problems."""
    prompts = [list(prompt) for prompt in pd.read_parquet(file).prompt[:count]]
    return [
        (problem_key(prompt), tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        for prompt in prompts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config, rollout = (whole := read_config(options.run)), whole.actor_rollout_ref.rollout
    metrics = read_metrics(options.run)
    last = max(metrics)
    steps = [line for step, line in metrics.items() if step > last // 2]
    model = str(hugging_face_folder(find(str(options.run)), print))
    work = (
        ("rollout", "train_files", config.data.train_batch_size, rollout.n, config.divergence.k, "timing_s/gen"),
        ("validation", "val_files", None, rollout.val_kwargs.n, 0, "timing_s/testing"),
    )
    # For the engine's own processes, in which it computes.
    os.environ.update(process_environment(on_cpu=True, model=model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    engine, rows = engine_of(model, config), []
    for name, files, count, n, k, timing in work:
        prompts = prompts_of(config.data[files], count, tokenizer)
        for asked in dict.fromkeys([None, 0, k]):
            seconds, tokens = [], 0
            for _ in range(options.rounds + 1):
                began = time.perf_counter()
                tokens = generate(engine, prompts, n, asked, config, last)
                seconds.append(time.perf_counter() - began)
            alone = sorted(seconds[1:])  # the first one warms up
            in_run = sorted(line[timing] for line in (steps if name == "rollout" else [metrics[last]]))
            rows.append((name, len(prompts) * n, tokens, "none" if asked is None else asked, alone, in_run))
    lengths = statistics.median(line["response_length/mean"] for line in steps)
    tokens_in_run = {
        "rollout": lengths * config.data.train_batch_size * rollout.n,
        "validation": tokens_of_validation(options.run, last, tokenizer),
    }
    columns = ("what", "responses", "tokens", "K", "engine alone, s", "in the run, tokens", "s", "ratio", "a token")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for name, responses, tokens, asked, alone, in_run in rows:
        ratio, there = statistics.median(in_run) / statistics.median(alone), tokens_in_run[name]
        print(
            f"| {name} | {responses:,} | {tokens:,} | {asked} | {shown(alone)} | {there:,.0f} | {shown(in_run)} "
            f"| {ratio:.2f} | {ratio * tokens / there:.2f} |"
        )


def tokens_of_validation(run: Path, step: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Their ends included."""
    lines = read_lines(run / "validation" / f"{step}.jsonl")
    return sum(len(tokenizer(line["output"], add_special_tokens=False).input_ids) + 1 for line in lines)


def shown(seconds: list[float]) -> str:
    """The median, with the lowest and highest value."""
    return f"{statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"


if __name__ == "__main__":
    main()
