"""Sampling for `cppo eval`: ``python -m cppo_verl.evaluation.generation EVALUATION_FOLDER`` (``cppo eval`` starts it).

One vLLM engine per model replica, spread over the GPUs at hand (or one on the CPU) as Ray actors. Each sample is graded
and written as soon as it is finished, so that a killed evaluation goes on where it was.
"""

import asyncio
import functools
import inspect
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from verl.utils.import_utils import load_extern_object

from cppo_verl.adapters.rollout.seeding import problem_key, response_seed
from cppo_verl.evaluation.samples import (
    SAMPLES,
    Evaluation,
    EvaluationError,
    Question,
    Sample,
    grade_sample,
)
from cppo_verl.run import lifeline, progress
from cppo_verl.run.files import write_lines
from cppo_verl.run.log import RunLog

_GRADING_THREADS = 8
_LOADING_LIMIT = 3600  # seconds until every copy of the model is loaded


class Replica:
    """One copy of the model; lives in a Ray actor."""

    def __init__(self, engine: dict[str, Any]) -> None:
        progress.report("model copy")
        from vllm import EngineArgs, LLMEngine

        self.engine = LLMEngine.from_engine_args(EngineArgs(**engine))

    def ready(self) -> bool:
        return True

    def generate(
        self, requests: list[tuple[str, list[int], int]], decoding: dict[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield finished responses as they come, in lists; a request is (id, prompt tokens, sampling seed)."""
        from vllm import SamplingParams

        for name, prompt, seed in requests:
            self.engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(seed=seed, **decoding))
        while self.engine.has_unfinished_requests():
            progress.advance()  # a step of the engine; a long response may be hours of them
            finished = [output for output in self.engine.step() if output.finished]
            if finished:
                yield [
                    {
                        "id": output.request_id,
                        "token_ids": list(output.outputs[0].token_ids),
                        "finish_reason": output.outputs[0].finish_reason,
                    }
                    for output in finished
                ]


class SampleWriter:
    """Grades finished responses on threads and appends them to samples.jsonl, each line at once."""

    def __init__(self, evaluation: Evaluation, tokenizer: Any, reward: Any) -> None:
        self.tokenizer, self.reward = tokenizer, reward
        path = evaluation.folder / SAMPLES
        write_lines(path, map(asdict, evaluation.samples.values()))  # without a last line that a kill cut off
        self._file = open(path, "a")  # noqa: SIM115
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_GRADING_THREADS)

    def add(self, question: Question, number: int, seed: int, output: dict[str, Any]) -> None:
        # Decoded as verl does for the reward: one text for training, validation and evaluation.
        text = self.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        sample = Sample(
            benchmark=question.benchmark,
            question=question.id,
            sample=number,
            seed=seed,
            response=text,
            tokens=len(output["token_ids"]),
            finish_reason=str(output["finish_reason"]),
            outcome="",
            answer=None,
        )
        self._threads.submit(self._grade, sample, question)

    def close(self) -> None:
        """Wait for the last verdict; all of them are on disk then."""
        self._threads.shutdown(wait=True)
        os.fsync(self._file.fileno())
        self._file.close()

    def _grade(self, sample: Sample, question: Question) -> None:
        line = json.dumps(asdict(grade_sample(sample, question, self.reward))) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()


def run(folder: Path) -> None:
    """Make the missing samples of an evaluation."""
    from transformers import AutoTokenizer

    log = RunLog(folder)
    evaluation = Evaluation.read(folder)
    settings, engine = evaluation.manifest["settings"], dict(evaluation.manifest["attempts"][-1]["engine"])
    decoding = {name: value for name, value in settings["decoding"].items() if name not in ("n", "seed", "dtype")}
    gpus = engine.pop("gpus_per_replica")
    reward = reward_function(settings["reward"])
    tokenizer = AutoTokenizer.from_pretrained(engine["model"], trust_remote_code=engine["trust_remote_code"])

    prompts = {
        (question.benchmark, question.id): chat_tokens(tokenizer, question.prompt, settings["chat"]["arguments"])
        for question in evaluation.questions
    }
    engine["max_model_len"] = max(map(len, prompts.values())) + decoding["max_tokens"]
    if not engine["enable_chunked_prefill"]:
        engine["max_num_batched_tokens"] = max(8192, engine["max_model_len"])  # a prompt must fit a step
    missing = {str(position): wanted for position, wanted in enumerate(evaluation.missing())}
    requests = []
    for name, (question, number) in missing.items():
        seed = response_seed(settings["decoding"]["seed"], 0, problem_key(question.prompt), number)
        requests.append((name, prompts[question.benchmark, question.id], seed))

    progress.phase("starting Ray")
    log.event("starting Ray")
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(address="local", include_dashboard=False, **({} if gpus else {"num_gpus": 0}))
    count = min(_replicas(gpus), len(requests))
    progress.phase("loading the model")
    log.event("loading the model", replicas=count)
    actor_class = ray.remote(max_concurrency=1, num_cpus=1, num_gpus=gpus)(Replica)
    actors = [actor_class.remote(engine) for _ in range(count)]
    loaded = [actor.ready.remote() for actor in actors]
    _, waiting = ray.wait(loaded, num_returns=count, timeout=_LOADING_LIMIT)
    if waiting:
        raise RuntimeError(
            f"{len(waiting)} of {count} copies of the model did not load within {_LOADING_LIMIT // 60} minutes: "
            "are the GPUs that Ray sees taken by another job?"
        )
    ray.get(loaded)
    progress.phase("generation")
    log.event("generating")
    writer = SampleWriter(evaluation, tokenizer, reward)
    seeds = {name: seed for name, _, seed in requests}

    def collect(actor: Any, share: list[tuple[str, list[int], int]]) -> None:
        for reference in actor.generate.options(num_returns="streaming").remote(share, decoding):
            for output in ray.get(reference):
                writer.add(*missing[output["id"]], seeds[output["id"]], output)

    # Neighbouring samples share a prompt; dealing them out gives every replica the same mixture of questions.
    failures = _side_by_side(
        [functools.partial(collect, actor, requests[place :: len(actors)]) for place, actor in enumerate(actors)]
    )
    writer.close()
    if failures:
        raise failures[0]


def _side_by_side(jobs: list[Callable[[], None]]) -> list[BaseException]:
    """Run the jobs on threads, each to its end; what they raised. A signal ends the wait, and with it the process."""
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run_one(job: Callable[[], None]) -> None:
        try:
            job()
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    for job in jobs:
        threading.Thread(target=run_one, args=(job,), daemon=True).start()
    return [error for error in (ended.get() for _ in jobs) if error is not None]


def _replicas(gpus: int) -> int:
    """How many copies of the model fit the GPUs that Ray sees; one without GPUs."""
    if not gpus:
        return 1
    nodes = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    fit = sum(seen // gpus for seen in nodes)
    if fit == 0:
        raise RuntimeError(f"one copy of the model takes {gpus} GPUs of one node (--tensor-parallel); Ray sees {nodes}")
    return fit


def reward_function(setting: dict[str, Any]) -> Callable[..., Any]:
    """The function that ``reward.custom_reward_function`` names, with its keywords; a coroutine is run to its end."""
    try:
        function = load_extern_object(setting["path"], setting["name"])
    except Exception as error:
        raise EvaluationError(f"the reward function of {setting['path']} cannot be loaded: {error}") from None
    if setting["kwargs"]:
        function = functools.partial(function, **setting["kwargs"])
    if inspect.iscoroutinefunction(function):
        return lambda **arguments: asyncio.run(function(**arguments))
    return function


def chat_tokens(tokenizer: Any, messages: list[dict[str, str]], arguments: dict[str, Any]) -> list[int]:
    """The prompt as verl's agent loop builds it."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **arguments
    )


def main(folder: str) -> None:
    lifeline.heed()
    progress.report("evaluation")
    with RunLog(folder).outcome():
        run(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
    lifeline.leave()
