"""Responses that a weight update interrupted, stitched: each token with the rows and the version that sampled it.

verl sends an interrupted request again with the tokens so far, and merges ids, log-probabilities and routed experts of
the pieces. Of all else that a server says of a piece it keeps four names; ours are collected here, piece by piece.
"""

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from verl.workers.rollout import llm_server
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from cppo_verl.adapters.columns import ROLLOUT_VERSION, TOPK_COLUMNS, TRUNCATED
from cppo_verl.adapters.rollout.client import DirectClient
from cppo_verl.adapters.rollout.seeding import piece_seed

# verl's stop reason of a piece that was interrupted.
_ABORTED = ("aborted", "abort")

# Seconds until an interrupted request is sent again.
_PAUSE = 0.01


class _Pieces(list[TokenOutput]):
    """Of a response, so far."""

    interrupted = False  # and the next one is not asked for yet


# Of the response that the task generates.
_pieces: ContextVar[_Pieces] = ContextVar("pieces")


class _PromptAsyncio:
    """``asyncio`` to verl's module of the client, which waits a second before it sends an interrupted request again.

    (llm_server.py:345 of verl 0.9.1.) A server that is not ready lets requests wait in their order; where the weights
    are there sooner, the next step's prompts stand before those, at every step again. When verl waits no longer,
    tests/adapters/test_partial_rollout.py fails.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(delay: float, result: Any = None) -> Any:
        pieces = _pieces.get(None)
        return await asyncio.sleep(_PAUSE if pieces is not None and pieces.interrupted else delay, result)


class _PieceClient(LLMServerClient):
    """Sends one piece and keeps what came back. It stands between verl's resuming client and its plain one."""

    async def generate(self, request_id: str, *, sampling_params: dict[str, Any], **request: Any) -> TokenOutput:
        pieces = _pieces.get()
        pieces.interrupted = False
        if pieces and sampling_params.get("seed") is not None:
            # The seed of the response would draw the same numbers again.
            sampling_params = sampling_params | {"seed": piece_seed(sampling_params["seed"], len(pieces))}
        output = await super().generate(request_id, sampling_params=sampling_params, **request)
        pieces.append(output)
        pieces.interrupted = output.stop_reason in _ABORTED
        return output


class PartialRolloutClient(FullyAsyncLLMServerClient, _PieceClient):
    """verl's client that resumes interrupted requests; its outputs carry our columns for all their tokens."""

    async def generate(self, request_id: str, **request: Any) -> TokenOutput:
        llm_server.asyncio = _PromptAsyncio()
        before = _pieces.set(_Pieces())
        try:
            output = await super().generate(request_id, **request)
            output.extra_fields.update(stitched(_pieces.get(), output))
        finally:
            _pieces.reset(before)
        return output


class DirectPartialRolloutClient(PartialRolloutClient, DirectClient):
    """The same where one server serves all."""


def stitched(pieces: Sequence[TokenOutput], merged: TokenOutput) -> dict[str, Any]:
    """Our fields of a response from those of its pieces: a version a token, Top-K rows where they were asked for.

    Args:
        pieces: in order; a piece may have no token.
        merged: verl's output of all of them.

    Raises:
        RuntimeError: the pieces are not the merged response, or one of them lacks rows that another has.
    """
    spoken = [piece for piece in pieces if len(piece.token_ids)]
    lengths = [len(piece.token_ids) for piece in spoken]
    if sum(lengths) != len(merged.token_ids):
        raise RuntimeError(f"pieces of {lengths} tokens were merged into a response of {len(merged.token_ids)}")
    versions = [piece.extra_fields["global_steps"] for piece in spoken]
    fields: dict[str, Any] = {ROLLOUT_VERSION: np.repeat(np.array(versions, dtype=np.int32), lengths)}
    for name in TOPK_COLUMNS:
        rows = [piece.extra_fields.get(name) for piece in spoken]
        present = [column for column in rows if column is not None]
        if not present:
            continue
        if [len(column) for column in present] != lengths:
            raise RuntimeError(f"pieces of {lengths} tokens have {[len(column) for column in present]} rows of {name}")
        fields[name] = np.concatenate(present)
    last = pieces[-1]
    # An interrupted piece may have been as long as the response may be.
    cut = merged.stop_reason == "length" and last.stop_reason in _ABORTED
    fields[TRUNCATED] = cut or bool(last.extra_fields.get(TRUNCATED, False))
    return fields
