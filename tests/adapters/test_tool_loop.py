"""Top-K rows of a response of several turns: at the model's own tokens, nowhere else, whatever verl cuts or inserts."""

import asyncio
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

K = 3
PROMPT = [1, 2, 3]


class Builder:
    """verl's own alignment over merges of our choice: a seam may cut the last tokens and insert some."""

    def __init__(self):
        self.cut, self.inserted = 0, []

    def merge_assistant_tokens(self, runtime, tokens):
        return self._merged(runtime, tokens, "assistant")

    def merge_context_tokens(self, before, after, runtime, tools=None):
        return self._merged(runtime, after[-1]["content"], "context")

    def _merged(self, runtime, tokens, kind):
        from verl.utils.tokenizer.continuous_token import MergeResult

        kept = runtime[: len(runtime) - self.cut]
        return MergeResult([*kept, *self.inserted, *tokens], len(tokens), kind, list(self.inserted), self.cut)

    def align_response_metadata(self, *args, **kwargs):
        from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder

        return ContinuousTokenBuilder.align_response_metadata(self, *args, **kwargs)


class Client:
    """Speaks the given turns; a row says of which token it is."""

    def __init__(self, turns, topk=True):
        self.turns, self.topk, self.seeds = list(turns), topk, []

    async def generate(self, *, sampling_params, **_):
        from verl.workers.rollout.replica import TokenOutput

        self.seeds.append(sampling_params.get("seed"))
        tokens = self.turns.pop(0)
        fields = {"truncated": False}
        if self.topk:
            ids = np.array([[token, token + 1, token + 2] for token in tokens], dtype=np.int32).reshape(-1, K)
            fields |= {"topk_ids": ids, "rollout_topk_log_prob": -ids.astype(np.float32)}
        return TokenOutput(token_ids=tokens, log_probs=[-float(token) for token in tokens], extra_fields=fields)


def loop_of(client):
    from cppo_verl.adapters.rollout.agent_loop import _InPlace
    from cppo_verl.adapters.rollout.tool_loop import TrustRegionToolLoop, _Turns

    loop = TrustRegionToolLoop.__new__(TrustRegionToolLoop)
    loop._turns = loop.server_manager = _Turns(client)
    loop._rows, loop._rows_before = [], []
    loop._counts = {"tool_calls": 0, "tool_errors": 0}
    loop.continuous_token_builder, loop.loop = Builder(), _InPlace()
    return loop


async def spoken(loop, runtime, mask, log_probs, params):
    output = await loop.server_manager.generate(sampling_params=params, request_id="a", prompt_ids=runtime)
    merge, mask, log_probs = await loop.ct_merge_assistant_token(
        runtime, output.token_ids, mask, log_probs, assistant_logprobs=output.log_probs
    )
    return merge.token_ids, mask, log_probs


def check(loop, runtime, mask, log_probs, length=None):
    tokens = runtime[len(runtime) - len(mask) :][:length]
    mask, log_probs = mask[:length], log_probs[:length]
    columns = loop._columns(SimpleNamespace(response_mask=mask))
    assert columns["topk_ids"].shape == columns["rollout_topk_log_prob"].shape == (len(mask), K)
    assert (columns["topk_ids"].dtype, columns["rollout_topk_log_prob"].dtype) == (torch.int32, torch.float32)
    for number, (token, own, log_prob) in enumerate(zip(tokens, mask, log_probs, strict=True)):
        wanted = [token, token + 1, token + 2] if own else [0, 0, 0]
        assert columns["topk_ids"][number].tolist() == wanted
        assert columns["rollout_topk_log_prob"][number, 0] == log_prob


@pytest.mark.parametrize("seed", range(40))
def test_a_row_for_every_token_that_the_model_spoke(seed):
    """Turns and answers of any length, seams that cut or insert, the response cut off anywhere."""
    draw = random.Random(seed)
    turns = [[draw.randrange(10, 50) for _ in range(draw.randrange(0 if turn else 1, 6))] for turn in range(4)]
    loop = loop_of(Client(turns))

    async def run():
        runtime, mask, log_probs = list(PROMPT), [], []
        for turn in range(len(turns)):
            loop.continuous_token_builder.cut, loop.continuous_token_builder.inserted = 0, []
            runtime, mask, log_probs = await spoken(loop, runtime, mask, log_probs, {})
            check(loop, runtime, mask, log_probs)
            if turn == len(turns) - 1:
                break
            loop.continuous_token_builder.cut = draw.randrange(0, min(3, len(mask) + 1))
            loop.continuous_token_builder.inserted = [7] * draw.randrange(0, 3)
            answer = [{"content": [100] * draw.randrange(1, 5)}]
            merge, mask, log_probs = await loop.ct_merge_context_msg([], answer, runtime, mask, log_probs)
            runtime = merge.token_ids
            check(loop, runtime, mask, log_probs)
        check(loop, runtime, mask, log_probs, length=draw.randrange(0, len(mask) + 1))

    asyncio.run(run())


def test_an_answer_that_verl_throws_away_takes_no_row_with_it():
    """It would have made the response too long; what it cut at the seam stays."""
    loop = loop_of(Client([[11, 12, 13]]))

    async def run():
        runtime, mask, log_probs = await spoken(loop, list(PROMPT), [], [], {})
        loop.continuous_token_builder.cut = 2
        await loop.ct_merge_context_msg([], [{"content": [100] * 9}], runtime, mask, log_probs)
        check(loop, runtime, mask, log_probs)

    asyncio.run(run())


def test_rows_that_do_not_fit_are_an_error():
    loop = loop_of(Client([[11, 12, 13]]))
    asyncio.run(spoken(loop, list(PROMPT), [], [], {}))
    with pytest.raises(RuntimeError, match="no row for each of the 2 tokens"):
        loop._columns(SimpleNamespace(response_mask=[1, 0, 1]))


def test_every_turn_draws_from_a_seed_of_its_own():
    client = Client([[11], [12], [13]])
    loop = loop_of(client)

    async def run():
        runtime, mask, log_probs = list(PROMPT), [], []
        for _ in range(3):
            runtime, mask, log_probs = await spoken(loop, runtime, mask, log_probs, {"seed": 5})

    asyncio.run(run())
    assert client.seeds[0] == 5
    assert len(set(client.seeds)) == 3


def echo(text: str) -> str:
    """Say it again.

    Args:
        text: what to say.
    """
    if text == "sleep":
        time.sleep(1.0)
    if text == "fail":
        raise RuntimeError("no disk")
    return text


def test_calls_and_failures_are_counted_and_a_tool_that_hangs_is_given_up():
    from verl.experimental.agent_loop.tool_agent_loop import AgentData
    from verl.experimental.agent_loop.tool_parser import FunctionCall
    from verl.tools.function_tool import FunctionTool, _build_schema_from_fn

    loop = loop_of(Client([]))
    loop.config = SimpleNamespace(run=SimpleNamespace(tool_timeout=0.3))
    loop.tools = {"echo": FunctionTool("echo", echo, _build_schema_from_fn(echo, "echo"))}
    loop.max_tool_response_length, loop.tool_response_truncate_side = 256, "middle"
    data = AgentData([], [], [], None, None, {}, "a", {})

    async def answers(*calls):
        answered = [await loop._call_tool(FunctionCall(name=n, arguments=a), {}, data) for n, a in calls]
        return [answer.text for answer, _, _ in answered]

    texts = asyncio.run(
        answers(
            ("echo", '{"text": "Hi"}'),
            ("echo", '{"text": "fail"}'),
            ("echo", '{"text": "sleep"}'),
            ("eccho", "{}"),
            ("echo", "{"),
            ("echo", '{"txt": 1}'),
        )
    )
    assert texts[0] == "Hi"
    assert "no disk" in texts[1]
    assert "no answer within 0.3 seconds" in texts[2]
    assert "Unknown function 'eccho'" in texts[3]
    assert loop._counts == {"tool_calls": 6, "tool_errors": 5}
