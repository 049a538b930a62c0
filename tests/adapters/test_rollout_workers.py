"""Responses go on in batches as they would alone: batching, reward inputs, puts, the only server."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cppo_verl.adapters.rollout.batching import Batched
from cppo_verl.config.compose import compose, config_dir
from cppo_verl.quickstart.model import build_tokenizer
from cppo_verl.quickstart.specs import ModelShape


def test_what_comes_while_a_call_is_under_way_goes_together_in_the_next():
    sent, gate = [], asyncio.Event()

    async def send(items):
        sent.append(items)
        await gate.wait()
        return [item * 10 for item in items]

    async def run():
        batched = Batched(send)
        tasks = [asyncio.create_task(batched(1))]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(batched(item)) for item in (2, 3)]
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(*tasks) == [10, 20, 30]
        assert await batched(4) == 40  # and again after it has been idle

    asyncio.run(run())
    assert sent == [[1], [2, 3], [4]]


def test_an_error_is_raised_for_the_items_it_belongs_to():
    async def send(items):
        if "all" in items:
            raise OSError("no connection")
        return [ValueError(item) if item == "one" else item for item in items]

    async def run():
        batched = Batched(send)
        return await asyncio.gather(
            *map(batched, ("fine", "one", "fine")), return_exceptions=True
        ), await asyncio.gather(*map(batched, ("fine", "all")), return_exceptions=True)

    (first, second, third), lost = asyncio.run(run())
    assert (first, third) == ("fine", "fine")
    assert isinstance(second, ValueError)
    assert [type(error) for error in lost] == [OSError, OSError]


def test_a_cancelled_caller_takes_nobody_with_it():
    async def send(items):
        await asyncio.sleep(0.01)
        return items

    async def run():
        batched = Batched(send)
        first, second = (asyncio.create_task(batched(item)) for item in (1, 2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(run()) == 2


PROMPTS, RESPONSES = [[7, 8, 9], [5], [3, 4]], [[11, 12], [13, 14, 15, 16], []]


def ungraded():
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    rows = []
    for number, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        output = AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=response,
            response_mask=[1] * len(response),
            metrics=AgentLoopMetrics(),
            extra_fields={"turn_scores": [], "number": number},
        )
        row = {
            "raw_prompt": [{"role": "user", "content": str(number)}],
            "data_source": "sums",
            "reward_model": {"ground_truth": str(number)},
            "extra_info": {"index": number},
        }
        rows.append((output, row))
    return rows


def test_a_reward_manager_sees_in_a_batch_what_it_sees_alone():
    """What verl's naive and dapo managers read of an item, and that the item is the right one."""
    from cppo_verl.adapters.rollout.workers import reward_inputs

    together = reward_inputs(ungraded())
    for number, response in enumerate(ungraded()):
        alone, item = reward_inputs([response])[0], together[number : number + 1][-1:][0]
        for data in (alone, item):
            length = data.batch["responses"].shape[-1]
            valid = data.batch["attention_mask"][-length:].sum() if length else 0
            assert data.batch["responses"][:valid].tolist() == RESPONSES[number]
            width = data.batch["prompts"].shape[-1]
            valid = data.batch["attention_mask"][:width].sum()
            assert data.batch["prompts"][-valid:].tolist() == PROMPTS[number]
        assert item.non_tensor_batch == alone.non_tensor_batch
        assert item.non_tensor_batch["reward_model"] == {"ground_truth": str(number)}
        assert item.non_tensor_batch["raw_prompt"] == [{"role": "user", "content": str(number)}]
        assert item.non_tensor_batch["tool_extra_fields"]["number"] == number


def test_training_and_validation_are_graded_at_once():
    """A row of training has columns of its own; with the first row's columns for all, whole batches were lost."""
    from cppo_verl.adapters.rollout.workers import _grading

    batches = []

    async def compute_score_batch(data):
        batches.append([sorted(data.non_tensor_batch), len(data)])
        return [{"reward_score": float(item.non_tensor_batch["reward_model"]["ground_truth"])} for item in data]

    worker = SimpleNamespace(compute_score_batch=SimpleNamespace(remote=compute_score_batch))
    responses = [
        (output, {**row, "cppo_topk": 20} if place != 1 else row) for place, (output, row) in enumerate(ungraded())
    ]
    results = asyncio.run(_grading(worker)(responses))
    assert [result["reward_score"] for result in results] == [0.0, 1.0, 2.0]
    assert [(count, "cppo_topk" in names) for names, count in batches] == [(2, True), (1, False)]


def test_what_a_tool_answered_is_not_graded():
    from cppo_verl.adapters.rollout.workers import reward_inputs

    output, row = ungraded()[1]
    output.response_mask = [1, 0, 0, 1]
    data = reward_inputs([(output, row)])
    assert data.batch["responses"].tolist() == [[13, 16]]
    assert data.non_tensor_batch["response_len"].tolist() == [2]


def test_verls_own_reward_manager_scores_a_batch(tmp_path):
    """verl's dapo manager over our grader, each response in a batch and alone."""
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager

    from cppo_verl.adapters.rollout.workers import reward_inputs
    from cppo_verl.grading import compute_score

    words = {11: "\\boxed{", 12: "0}", 13: "x", 14: "\\boxed{", 15: "1", 16: "}"}
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(words[int(token)] for token in ids))
    config = OmegaConf.create({"reward": {"reward_kwargs": {}}})

    async def run():
        manager = DAPORewardManager(config, tokenizer, compute_score)
        batch = reward_inputs(ungraded())
        together = [await manager.run_single(batch[row : row + 1]) for row in range(3)]
        return together, [await manager.run_single(reward_inputs([response])) for response in ungraded()]

    together, alone = asyncio.run(run())
    assert together == alone
    assert [result["reward_score"] for result in together] == [1.0, 1.0, 0.0]


def test_one_without_a_reward_leaves_the_others_theirs(monkeypatch):
    """A batch whose grading fails is graded one by one; the error is that of its own response."""
    from ray.exceptions import RayTaskError

    from cppo_verl.adapters.rollout import workers

    calls = []

    class Worker:
        @property
        def compute_score_batch(self):
            async def fail(data):
                calls.append(len(data))
                raise RayTaskError("compute_score_batch", "", ValueError("one of them"))

            return SimpleNamespace(remote=fail)

        @property
        def compute_score(self):
            async def grade(data):
                calls.append(len(data))
                number = data[0].non_tensor_batch["tool_extra_fields"]["number"]
                if number == 1:
                    raise ValueError("this one")
                return {"reward_score": number}

            return SimpleNamespace(remote=grade)

    results = asyncio.run(workers._grading(Worker())(ungraded()))
    assert [results[0], results[2]] == [{"reward_score": 0}, {"reward_score": 2}]
    assert str(results[1]) == "this one"
    assert calls == [3, 1, 1, 1]


def test_puts_of_whole_responses_go_together_and_keep_their_keys(monkeypatch):
    from cppo_verl.adapters.rollout import workers

    puts = []

    async def put(keys, fields, tags, partition_id):
        puts.append((partition_id, keys, sorted(fields.keys()), [tag["row"] for tag in tags]))
        assert [int(row[0]) for row in fields["responses"]] == [tag["row"] for tag in tags]
        await asyncio.sleep(0)

    monkeypatch.setattr(workers.tq, "async_kv_batch_put", put)

    async def run():
        queue = workers.QueueInBatches()

        def response(row, partition, **more):
            field = {"responses": torch.full((1 + row % 3,), row), "uid": f"p{row}", **more}
            return queue.async_kv_batch_put(
                keys=[f"p{row}_0_0"], partition_id=partition, fields=[field], tags=[{"row": row}]
            )

        log_probs = {"rollout_log_probs": torch.zeros(1)}
        await asyncio.gather(
            response(0, "train", **log_probs),
            response(1, "train"),  # aborted before its first token
            response(2, "train", **log_probs),
            response(3, "val", **log_probs),
        )
        assert queue.kv_list is workers.tq.kv_list  # all else is TransferQueue's own

    asyncio.run(run())
    with_log_probs = ["responses", "rollout_log_probs", "uid"]
    assert sorted(puts) == [
        ("train", ["p0_0_0", "p2_0_0"], with_log_probs, [0, 2]),
        ("train", ["p1_0_0"], ["responses", "uid"], [1]),
        ("val", ["p3_0_0"], with_log_probs, [3]),
    ]


def test_the_only_server_is_asked_straight_away():
    from cppo_verl.adapters.rollout.client import DirectClient

    calls = []

    async def generate(**request):
        calls.append(request)
        return SimpleNamespace(token_ids=[1], extra_fields={"global_steps": 3})

    server = SimpleNamespace(generate=SimpleNamespace(remote=generate))
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="vllm")))
    client = DirectClient(config, address="here", server=server)
    output = asyncio.run(client.generate("r", prompt_ids=[5], sampling_params={"seed": 1}, priority=2))
    assert output.extra_fields == {"global_steps": 3, "min_global_steps": 3, "max_global_steps": 3}
    assert [(call["prompt_ids"], call["sampling_params"], call["priority"]) for call in calls] == [
        ([5], {"seed": 1}, 2)
    ]


class Engine:
    """vLLM's engine as the server uses it: a request is known some time after it was made, and has one output."""

    def __init__(self):
        self.output_processor = SimpleNamespace(external_req_ids={})
        self.asked = []

    async def generate(self, prompt, sampling_params, request_id):
        self.asked.append(sampling_params)
        await asyncio.sleep(0.01)
        self.output_processor.external_req_ids[request_id] = [request_id]
        await asyncio.sleep(0.05)
        logprobs = SimpleNamespace(columns=lambda length: {"topk_ids": np.zeros((length, 2))})
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason="length", token_ids=[1, 2], logprobs=logprobs)])


@pytest.fixture
def server():
    from cppo_verl.adapters.rollout.server import TopKServer

    made = object.__new__(TopKServer)
    made.engine = Engine()
    made._engine_generate, made._finished = made.engine.generate, {"r1": {}}
    return made


@pytest.mark.parametrize("stop", [[], ["."]])
def test_a_request_counts_as_admitted_once_the_engine_has_it(server, stop):
    """verl's gate opens at the first output; the only real one comes at the end of the response."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(logprobs=0, extra_args={"cppo_topk": 2} if not stop else None, stop=stop)

    async def run():
        outputs = server._generate_with_topk("prompt", params, "r1")
        first = await anext(outputs)
        admitted = dict(server.engine.output_processor.external_req_ids)
        return first, admitted, [output async for output in outputs]

    first, admitted, rest = asyncio.run(run())
    assert first is None
    assert admitted == {"r1": ["r1"]}
    assert [output.outputs[0].token_ids for output in rest] == [[1, 2]]
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    assert params.detokenize is bool(stop)  # a stop string is looked for in the text
    assert server._finished["r1"]["truncated"] is True


def test_a_request_that_fails_before_the_engine_has_it_raises(server):
    from vllm import SamplingParams

    async def refuse(*_):
        raise ValueError("the prompt is too long")
        yield

    server._engine_generate = refuse

    async def run():
        return [output async for output in server._generate_with_topk("prompt", SamplingParams(), "r1")]

    with pytest.raises(ValueError, match="too long"):
        asyncio.run(run())


def test_requests_of_vllms_own_endpoints_are_left_as_they_are(server):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(output_kind=RequestOutputKind.DELTA)

    async def run():
        return [output async for output in server._generate_with_topk("prompt", params, "chat-1")]

    outputs = asyncio.run(run())
    assert [output.outputs[0].token_ids for output in outputs] == [[1, 2]]
    assert (params.output_kind, params.detokenize) == (RequestOutputKind.DELTA, True)
    assert server._finished == {"r1": {}}


@pytest.mark.parametrize("divergence", sorted(path.stem for path in (config_dir() / "divergence").glob("*.yaml")))
def test_the_agent_loop_under_every_divergence(divergence):
    """What a response brings along is what its divergence looks at: rows for Top-K, nothing for the others."""
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.workers.rollout.replica import TokenOutput

    from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK, TOPK_IDS
    from cppo_verl.adapters.rollout.agent_loop import TopKAgentLoopOutput, TrustRegionAgentLoop

    config = compose(["recipe=quickstart", f"divergence={divergence}"])
    k = config.divergence.k

    class Server:
        async def generate(self, *, sampling_params, **_):
            assert sampling_params.get("extra_args") == ({TOPK: k} if k else None)
            rows = {TOPK_IDS: np.zeros((2, k), np.int32), ROLLOUT_TOPK_LOG_PROB: np.zeros((2, k), np.float32)}
            return TokenOutput(token_ids=[9, 10], log_probs=[-1.0, -2.0], extra_fields=rows if k else {})

    loop = TrustRegionAgentLoop(
        trainer_config=DictConfigWrap(config=config),
        server_manager=Server(),
        tokenizer=build_tokenizer(ModelShape()),
        processor=None,
        dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config=config.data),
    )
    prompt = {"raw_prompt": [{"role": "user", "content": "1 + 2 = ?"}], "global_steps": 1, "session_id": 0}
    output = asyncio.run(loop.run({}, **prompt, **{TOPK: k}))
    assert output.response_ids == [9, 10]
    assert output.response_logprobs == [-1.0, -2.0]
    assert isinstance(output, TopKAgentLoopOutput) == (k > 0)
