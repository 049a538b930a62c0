"""What a step of several updates reports, and weights that reach servers of their own without an accelerator."""

import asyncio
import os

import pytest
import torch


def test_a_steps_counts_add_up_and_its_token_metrics_go_on():
    from cppo_verl.adapters.driver.modes import of_a_step

    first = {
        "grading/right": 3,
        "grading/wrong": 4,
        "grading/no_answer": 1,
        "grading/timeout": 0,
        "grading/error": 0,
        "grading/no_answer_rate": 1 / 8,
        "groups/total": 2,
        "groups/zero_variance": 1,
        "rollout/missing_responses": 0,
        "trust_region/tokens": 100.0,
        "trust_region/masked": 0.1,
        "actor/loss": 0.5,
    }
    second = first | {
        "grading/right": 0,
        "grading/no_answer": 4,
        "groups/zero_variance": 0,
        "rollout/missing_responses": 2,
        "trust_region/tokens": 250.0,
        "trust_region/masked": 0.2,
    }
    assert of_a_step([first, second]) == {
        "grading/right": 3,
        "grading/wrong": 8,
        "grading/no_answer": 5,
        "grading/timeout": 0,
        "grading/error": 0,
        "grading/no_answer_rate": 5 / 16,
        "groups/total": 4,
        "groups/zero_variance": 1,
        "rollout/missing_responses": 2,
        "trust_region/tokens": 250.0,
        "trust_region/masked": 0.2,
    }
    assert of_a_step([]) == {}


def test_groups_that_all_fail_end_the_run_and_some_that_fail_do_not():
    from types import SimpleNamespace

    from cppo_verl.adapters.driver.replay import giving_up

    evictions = []
    buffer = SimpleNamespace(
        finished_keys={"train": set()}, _evict_terminal_groups=lambda *arguments: evictions.append(arguments) or "done"
    )
    evict = giving_up(buffer, limit=4)

    def poll(failed, finished):
        buffer.finished_keys["train"] = set(finished)
        return evict(7, "train", (set(), set(), set(failed), {}))

    for _ in range(3):  # a finished one between them
        assert poll("abc", "") == "done"
        assert poll("", "z") == "done"
        assert poll("", "") == "done"  # trained
    poll("ab", "y")
    poll("", "y")  # still there: not another one
    poll("c", "y")
    assert len(evictions) == 12
    with pytest.raises(RuntimeError, match="4 groups of responses in a row could not be generated or graded"):
        poll("d", "y")
    with pytest.raises(RuntimeError, match="8 groups"):
        giving_up(buffer, limit=8)(7, "train", (set(), set(), set("abcdefgh"), {}))
    assert len(evictions) == 12


@pytest.fixture
def engines():
    """Two actor ranks and a server's worker, ready to send and receive."""
    from cppo_verl.adapters.cpu import weights

    new = weights.SharedMemoryCheckpointEngine
    actors, servers = [new(bucket_size=1, is_master=rank == 0) for rank in (0, 1)], [new(bucket_size=1)]
    metadata = [engine.prepare() for engine in (*actors, *servers)]
    for group, arguments in zip((actors, servers), new.build_topology(2, 1, metadata), strict=True):
        for number, engine in enumerate(group):
            engine.init_process_group(**{name: values[number] for name, values in arguments.items()})
    yield actors, servers[0], metadata[0]
    for engine in actors:
        engine.finalize()
    assert not os.path.exists(metadata[0])  # no name anywhere else: nothing is left by a process that is killed


def test_weights_arrive_as_they_were_sent(engines):
    actors, server, path = engines
    whole = torch.arange(12.0).reshape(3, 4)
    sent = {"a": whole, "tied": whole, "part": whole[:, 1:2], "half": torch.ones(2, dtype=torch.bfloat16)}
    asked = []

    def gathered():
        for name, tensor in sent.items():
            asked.append(name)
            yield name, tensor

    async def both():
        receiving = asyncio.create_task(received())
        await asyncio.sleep(0)  # it waits for what is not there yet
        for actor in actors:
            await actor.send_weights(gathered(), global_steps=3)
        return await receiving

    async def received():
        return {name: tensor.clone() async for name, tensor in server.receive_weights(global_steps=3)}

    found = asyncio.run(both())
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert asked == 2 * list(sent)  # gathering is a collective: every rank goes through all of them
    assert os.readlink(path).startswith("/memfd:cppo-weights")


def test_weights_that_never_come_are_an_error(engines, monkeypatch):
    from cppo_verl.adapters.cpu import weights

    monkeypatch.setattr(weights, "_LONGEST_WAIT", 0.05)
    _, server, _ = engines

    async def receive():
        return [name async for name, _ in server.receive_weights(global_steps=7)]

    with pytest.raises(TimeoutError, match="has not written the weights of step 7"):
        asyncio.run(receive())
