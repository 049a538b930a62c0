"""The rollout's side of the Top-K divergence: arrays out of vLLM, and their way through TransferQueue."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

K = 5


def logprobs_lists(tokens, width, seed=0):
    """vLLM's record of some tokens: the sampled one first, then the most likely ones."""
    from vllm.v1.outputs import LogprobsLists

    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 50, (tokens, width + 1)).astype(np.int32)
    values = -np.sort(generator.exponential(2.0, (tokens, width + 1)).astype(np.float32), axis=-1)
    return LogprobsLists(ids, values, np.ones(tokens, dtype=np.int32), None)


def request(extra_args, logprobs=K):
    params = SimpleNamespace(extra_args=extra_args, num_logprobs=logprobs, prompt_logprobs=None, flat_logprobs=False)
    return SimpleNamespace(sampling_params=params)


def test_arrays_are_what_vllms_own_collector_holds():
    """Steps of one and of several tokens (speculative decoding), and rows wider than K (another request's wish)."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK, TOPK_IDS
    from cppo_verl.adapters.rollout.server import TopKLogprobsProcessor

    ours = TopKLogprobsProcessor.from_new_request(None, request({TOPK: K}))
    stock = LogprobsProcessor.from_new_request(None, request(None))
    steps = [logprobs_lists(1 + seed % 3, K + 2 * (seed % 2), seed) for seed in range(100)]
    for step in steps:
        for processor in (ours, stock):
            processor.update_from_output(SimpleNamespace(new_logprobs=step, new_prompt_logprobs_tensors=None))
    sampled = np.concatenate([step.logprob_token_ids[:, 0] for step in steps]).tolist()
    assert len(ours.logprobs) == len(stock.logprobs) == len(sampled) > 128
    assert ours.cumulative_logprob == pytest.approx(stock.cumulative_logprob, rel=1e-5)
    # What verl's server reads.
    read = [position[sampled[i]].logprob for i, position in enumerate(ours.logprobs)]
    assert read == [step[1][row, 0].item() for step in steps for row in range(len(step[0]))]
    columns = ours.logprobs.columns(len(sampled))
    ids, log_probs = columns[TOPK_IDS], columns[ROLLOUT_TOPK_LOG_PROB]
    assert (ids.dtype, log_probs.dtype) == (np.int32, np.float32)
    assert np.array_equal(ids, np.concatenate([step[0][:, 1 : K + 1] for step in steps]))
    assert np.array_equal(log_probs, np.concatenate([step[1][:, 1 : K + 1] for step in steps]))
    for row, position in zip(ids, stock.logprobs, strict=True):
        assert set(row.tolist()) <= set(position)


@pytest.mark.parametrize("extra_args", [None, {}, {"kv_transfer_params": {}}])
def test_other_requests_get_vllms_own_collector(extra_args):
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from cppo_verl.adapters.rollout.server import TopKLogprobsProcessor

    for logprobs in (None, 3):
        processor = TopKLogprobsProcessor.from_new_request(None, request(extra_args, logprobs=logprobs))
        assert type(processor) is LogprobsProcessor


def test_the_sampled_tokens_alone_are_what_vllms_own_collector_holds():
    """A validation asks for them; in place of a dictionary and an object for each token."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from cppo_verl.adapters.rollout.server import TopKLogprobsProcessor

    ours = TopKLogprobsProcessor.from_new_request(None, request(None, logprobs=0))
    stock = LogprobsProcessor.from_new_request(None, request(None, logprobs=0))
    assert isinstance(ours, TopKLogprobsProcessor)
    steps = [logprobs_lists(1 + seed % 3, 0, seed) for seed in range(50)]
    for step in steps:
        for processor in (ours, stock):
            processor.update_from_output(SimpleNamespace(new_logprobs=step, new_prompt_logprobs_tensors=None))
    sampled = np.concatenate([step.logprob_token_ids[:, 0] for step in steps]).tolist()
    read = [
        [position[sampled[i]].logprob for i, position in enumerate(held)] for held in (ours.logprobs, stock.logprobs)
    ]
    assert read[0] == read[1]
    assert len(read[0]) == len(sampled)


def trajectory(tokens, *, cut=None, dtype=torch.float32, seed=0):
    """The fields of one response as the agent loop hands them over; ``cut``: verl's own limit on the response."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK_IDS
    from cppo_verl.adapters.rollout.agent_loop import TopKAgentLoopOutput

    lists = logprobs_lists(tokens, K, seed)
    kept = tokens if cut is None else cut
    output = AgentLoopOutput(
        prompt_ids=[1, 2, 3],
        response_ids=lists[0][:kept, 0].tolist(),
        response_mask=[1] * kept,
        response_logprobs=lists[1][:kept, 0].tolist(),
        metrics=AgentLoopMetrics(),
        extra_fields={"turn_scores": []},
    )
    columns = {
        TOPK_IDS: torch.from_numpy(lists[0][:, 1:].copy()),
        ROLLOUT_TOPK_LOG_PROB: torch.from_numpy(lists[1][:, 1:].copy()).to(dtype),
    }
    return TopKAgentLoopOutput.of(output, columns), columns


@pytest.mark.parametrize(("tokens", "cut"), [(6, None), (6, 4), (1, None), (0, None)])
def test_a_trajectory_carries_a_row_for_every_token_of_its_response(tokens, cut):
    from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK_IDS

    output, columns = trajectory(tokens, cut=cut)
    fields = output.as_dict()
    length = tokens if cut is None else cut
    assert fields[TOPK_IDS].shape == fields[ROLLOUT_TOPK_LOG_PROB].shape == (length, K)
    assert (fields[TOPK_IDS].dtype, fields[ROLLOUT_TOPK_LOG_PROB].dtype) == (torch.int32, torch.float32)
    assert torch.equal(fields[TOPK_IDS], columns[TOPK_IDS][:length])
    assert fields["extra_fields"] == {"turn_scores": []}  # nothing bulky goes to the reward workers
    assert not any("topk" in name for name in output.model_dump())


@pytest.fixture(scope="module")
def queue():
    """TransferQueue on a local Ray."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    from cppo_verl.config.compose import compose

    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    config = compose(["platform=cpu"]).transfer_queue
    OmegaConf.update(config, "enable", True, force_add=True)
    tq.init(config)
    yield tq
    tq.close()
    ray.shutdown()


def put(queue, keys, trajectories):
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    fields = []
    for output, _ in trajectories:
        field = output.as_dict()
        field |= {"loss_mask": field["response_mask"], "uid": "x", "session_id": 0}
        field["input_ids"] = torch.cat([field["prompts"], field["responses"]])
        field["position_ids"] = torch.arange(len(field["input_ids"]))
        fields.append(field)
    tags = [{"prompt_len": 3, "response_len": len(field["responses"])} for field in fields]
    queue.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
    return tags


@pytest.mark.parametrize("lengths", [[4, 2, 7, 1, 3], [5, 5, 5, 5, 5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_survive_the_queue_reordering_and_verls_padding(queue, lengths, dtype):
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

    from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK_COLUMNS, TOPK_IDS
    from cppo_verl.adapters.driver.trajectories import shorten_padding_rows

    trajectories = [trajectory(length, seed=row, dtype=dtype) for row, length in enumerate(lengths)]
    keys = [f"p{len(set(lengths))}{dtype}{row}_0_0" for row in range(len(lengths))]
    tags = []
    for row in range(len(keys)):  # as they finish: one by one
        tags += put(queue, keys[row : row + 1], trajectories[row : row + 1])
    batch = KVBatchMeta(keys=keys, tags=tags, partition_id="train", fields=None, extra_info={})
    batch = upsample_batch_to_divisible_size(batch, 4, eos_token_id=0)
    order = [6, 3, 0, 7, 2, 5, 4, 1]
    batch.reorder(order)
    shorten_padding_rows(batch, TOPK_COLUMNS)
    data = queue.kv_batch_get(keys=batch.keys, partition_id="train")
    for row, source in enumerate(order):
        found, log_probs = data[TOPK_IDS][row], data[ROLLOUT_TOPK_LOG_PROB][row]
        if source >= len(lengths):
            assert found.shape == log_probs.shape == (1, K)
            assert len(data["responses"][row]) == 1
        else:
            assert torch.equal(found, trajectories[source][1][TOPK_IDS])
            assert torch.equal(log_probs, trajectories[source][1][ROLLOUT_TOPK_LOG_PROB])
            assert log_probs.dtype == dtype
    queue.kv_clear(keys=batch.keys, partition_id="train")


@pytest.mark.parametrize(("dtype", "payload"), [(torch.float32, 160), (torch.float16, 120)])
def test_bytes_a_token_through_the_queue(dtype, payload):
    """At K = 20: what TransferQueue's encoder makes of a batch with the two fields, less the batch without them."""
    from transfer_queue.utils.serial_utils import encode
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK_IDS

    lengths = [300, 500, 700, 1000]
    rows = [
        {
            "responses": torch.zeros(n, dtype=torch.int64),
            TOPK_IDS: torch.zeros(n, 20).int(),
            ROLLOUT_TOPK_LOG_PROB: torch.zeros(n, 20),
        }
        for n in lengths
    ]
    for row in rows:
        row[ROLLOUT_TOPK_LOG_PROB] = row[ROLLOUT_TOPK_LOG_PROB].to(dtype)

    def size(names):
        batch = list_of_dict_to_tensordict([{name: row[name] for name in names} for row in rows])
        return sum(len(memoryview(part).cast("B")) for part in encode(batch))

    bytes_a_token = (size(["responses", TOPK_IDS, ROLLOUT_TOPK_LOG_PROB]) - size(["responses"])) / sum(lengths)
    print(f"{dtype}: {bytes_a_token:.1f} bytes a token, payload {payload}")
    assert payload <= bytes_a_token <= 1.05 * payload
