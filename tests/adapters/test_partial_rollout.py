"""A response that weight updates interrupted: tokens, Top-K rows, versions, seeds, over verl's resuming client."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

K = 3
PROMPT = [7, 8]


def rows(tokens):
    """Top-K columns that say of which token they are."""
    ids = np.array([[token, token + 100, token + 200] for token in tokens], dtype=np.int32).reshape(-1, K)
    return {"topk_ids": ids, "rollout_topk_log_prob": -ids.astype(np.float32) / 1000}


class Server:
    """Answers as our vLLM server: the tokens 10, 11, ... in pieces of the given lengths, each of a later version."""

    def __init__(self, lengths, topk=True, cut=False, pause=False):
        self.lengths, self.topk, self.cut, self.pause = lengths, topk, cut, pause
        self.requests, self.count = [], {}
        self.generate = SimpleNamespace(remote=self._generate)

    async def _generate(self, request_id, prompt_ids, sampling_params, **_):
        from verl.workers.rollout.replica import TokenOutput

        self.requests.append((list(prompt_ids), dict(sampling_params)))
        first = prompt_ids[0]
        piece = self.count[first] = self.count.get(first, -1) + 1
        if self.pause:
            await asyncio.sleep(0)
        done, length = len(prompt_ids) - len(PROMPT), self.lengths[piece]
        last = piece == len(self.lengths) - 1
        tokens = [first + 3 + done + number for number in range(length)]
        if length == 0 and not last:  # as verl's server answers at a closed gate
            return TokenOutput(
                token_ids=[], log_probs=None, stop_reason="aborted", extra_fields={"global_steps": 5 + piece}
            )
        fields = {"global_steps": 5 + piece, "truncated": self.cut and last, "num_cached_tokens": 0}
        if self.topk:
            fields |= rows(tokens)
        return TokenOutput(
            token_ids=tokens,
            log_probs=[-token / 10 for token in tokens],
            stop_reason="completed" if last else "aborted",
            extra_fields=fields,
        )


def client(server, response_length=100):
    from cppo_verl.adapters.rollout.partial import DirectPartialRolloutClient

    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "vllm", "response_length": response_length}}})
    return DirectPartialRolloutClient(config, address="here", server=server)


def generated(server, prompt=PROMPT, seed=None, **options):
    params = {"temperature": 1.0} | ({} if seed is None else {"seed": seed})
    one = client(server, **options)
    return asyncio.run(one.generate("a", prompt_ids=prompt, sampling_params=params))


def verls_own(server):
    """What verl's resuming client makes of it."""
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

    from cppo_verl.adapters.rollout.client import DirectClient

    class Verls(FullyAsyncLLMServerClient, DirectClient):
        pass

    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "vllm", "response_length": 100}}})
    one = Verls(config, address="here", server=server)
    return asyncio.run(one.generate("a", prompt_ids=PROMPT, sampling_params={}))


def test_a_response_interrupted_three_times_keeps_its_rows():
    server = Server([4, 0, 2, 3])
    output = generated(server)
    tokens = list(range(10, 19))
    assert output.token_ids == tokens
    assert output.log_probs == [-token / 10 for token in tokens]
    for name, wanted in rows(tokens).items():
        assert np.array_equal(output.extra_fields[name], wanted)
        assert output.extra_fields[name].dtype == wanted.dtype
    versions = output.extra_fields["rollout_version"]
    assert versions.tolist() == [5] * 4 + [7] * 2 + [8] * 3
    assert versions.dtype == np.int32
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (5, 8)
    assert output.extra_fields["truncated"] is False
    # Each piece is asked for behind what there was.
    assert [len(prompt) - len(PROMPT) for prompt, _ in server.requests] == [0, 4, 4, 6]


def test_an_interrupted_request_is_sent_again_at_once(monkeypatch):
    """verl's client waits a second, in which the next step's prompts overtake it; when it does not, ours can go."""
    from verl.workers.rollout import llm_server

    slept = []

    async def sleep(delay, result=None):
        slept.append(delay)

    server = Server([4, 0, 2, 3])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    generated(server)
    assert slept == [0.01] * 3
    # Nothing else is hurried: not a wait for a server, nor one of another task.
    asyncio.run(llm_server.asyncio.sleep(1))
    assert slept[3:] == [1]
    monkeypatch.setattr(llm_server, "asyncio", asyncio)
    verls_own(Server([4, 3]))
    assert slept[4:] == [1]


def test_verls_own_client_drops_the_rows():
    """The reason for ours; when verl keeps them, this fails and ours can go."""
    output = verls_own(Server([5]))
    assert output.token_ids == list(range(10, 15))
    assert not {"topk_ids", "truncated", "rollout_version"} & set(output.extra_fields)


def test_without_topk_there_are_versions():
    output = generated(Server([2, 1], topk=False))
    assert output.extra_fields["rollout_version"].tolist() == [5, 5, 6]
    assert "topk_ids" not in output.extra_fields


@pytest.mark.parametrize(
    ("lengths", "cut", "response_length", "truncated"),
    [
        ([5], True, 100, True),
        ([5], False, 5, False),  # it ended at its longest length, by itself
        ([3, 2], True, 5, True),
        ([3, 2], False, 5, False),
        ([3, 2, 1], False, 5, True),  # interrupted at its longest length: nothing is asked for any more
    ],
)
def test_whether_it_was_cut_off(lengths, cut, response_length, truncated):
    output = generated(Server(lengths, cut=cut), response_length=response_length)
    assert output.extra_fields["truncated"] is truncated
    assert len(output.token_ids) == min(sum(lengths), response_length)


def test_a_seeded_piece_has_a_seed_of_its_own():
    server = Server([2, 2, 2])
    generated(server, seed=11)
    seeds = [params["seed"] for _, params in server.requests]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    again = Server([2, 2, 2])
    generated(again, seed=11)
    assert [params["seed"] for _, params in again.requests] == seeds
    unseeded = Server([2, 2])
    generated(unseeded)
    assert not any("seed" in params for _, params in unseeded.requests)


def test_responses_at_the_same_time_do_not_mix():
    server = Server([2, 1, 2], pause=True)
    one = client(server)

    async def both():
        return await asyncio.gather(
            *(one.generate(str(first), prompt_ids=[first, 0], sampling_params={}) for first in (7, 1007, 2007))
        )

    for first, output in zip((7, 1007, 2007), asyncio.run(both()), strict=True):
        tokens = list(range(first + 3, first + 8))
        assert output.token_ids == tokens
        assert output.extra_fields["topk_ids"][:, 0].tolist() == tokens


def test_a_piece_without_the_rows_of_the_others_is_an_error():
    class Forgetful(Server):
        async def _generate(self, *args, **request):
            output = await super()._generate(*args, **request)
            if self.count[PROMPT[0]] == 1:
                del output.extra_fields["topk_ids"]
            return output

    with pytest.raises(RuntimeError, match=r"pieces of \[2, 2\] tokens have \[2\] rows of topk_ids"):
        generated(Forgetful([2, 2]))


def test_a_merge_that_lost_tokens_is_an_error():
    from verl.workers.rollout.replica import TokenOutput

    from cppo_verl.adapters.rollout.partial import stitched

    piece = TokenOutput(token_ids=[1, 2], extra_fields={"global_steps": 0})
    with pytest.raises(RuntimeError, match=r"pieces of \[2\] tokens were merged into a response of 1"):
        stitched([piece], TokenOutput(token_ids=[1]))
