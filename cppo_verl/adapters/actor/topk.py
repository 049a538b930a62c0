"""The actor's side of the Top-K divergence: log pi at the rollout's K ids, from the forward pass of the loss itself.

verl's engines show the loss function the logits of a micro-batch before they ask for its loss
(``distillation_use_topk``). :meth:`TopKLogits.collect` copies the K + 1 logits that each response token needs, wherever
tensor, sequence or context parallelism has put them, and :meth:`TopKLogits.finish` turns them into log-probabilities:
log pi(k) = logit_k - log Z with log Z = logit_y - log pi(y_t), so that no softmax is computed a second time.
"""

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed import ProcessGroup

from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK_COLUMNS, TOPK_IDS

# Two roundings of one number: vLLM's sampled and its top-K log-probabilities come from the same float32 array.
_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-10}


class TopK(NamedTuple):
    """The K most likely tokens of the rollout distribution at every response position of a micro-batch."""

    topk_ids: Tensor
    """int64 ``[B, T, K]``."""
    rollout_topk_log_prob: Tensor
    """log mu at them, float32 ``[B, T, K]``."""
    topk_log_prob: Tensor
    """log pi at them, float32 ``[B, T, K]``, without gradient."""
    sampled_in_topk: Tensor
    """bool ``[B, T]``."""


class TopKError(ValueError):
    """The rollout's Top-K data contradict its sampled tokens; training on them would be silently wrong."""


class TopKLogits:
    """Collects logits in the engine's logits hook and hands them to the loss of the same micro-batch."""

    def __init__(self) -> None:
        self._picked: Tensor | None = None  # [N, K + 1]
        self._vocabulary = 0

    @torch.no_grad()
    def collect(
        self, logits: Tensor, data: TensorDict, data_format: str | None = None, temperature: Tensor | None = None
    ) -> None:
        """Copy the logits at each response token's K ids and at the sampled token, float32; ``logits`` stay untouched.

        Args:
            logits: this rank's logits, ``[1, tokens / sp, V]`` (FSDP, packed sequences) or
                ``[*, tokens / cp, V / tp]`` (Megatron). Row t predicts token t + 1.
            data: the micro-batch of whole sequences.
            data_format: "thd" or "bshd" from verl's Megatron engine, None from its FSDP engines.
            temperature: of each row of ``logits``, ``[tokens / sp]``; None where they are divided by it already.

        Raises:
            TopKError: the trajectory's Top-K rows do not match its response tokens one to one.
        """
        _check_rows(data)
        ids = torch.cat([_flat(data[TOPK_IDS]).long(), _flat(data["responses"]).long().unsqueeze(-1)], dim=-1)
        layout = _fsdp_layout if data_format is None else _megatron_layout
        markers, first_id, vocabulary, groups = layout(response_markers(data), logits, data, data_format)
        if markers.shape != logits.shape[:2]:
            raise TopKError(f"positions {list(markers.shape)} do not match logits {list(logits.shape)}; not supported")
        self._picked = gather_logits(logits, markers, ids, first_id, groups, temperature)
        self._vocabulary = vocabulary

    @torch.no_grad()
    def finish(self, log_prob: Tensor, rollout_log_prob: Tensor, valid: Tensor, data: TensorDict) -> TopK:
        """Log-probabilities at the K ids, checked against the sampled tokens.

        Args:
            log_prob, rollout_log_prob: log pi and log mu of the sampled tokens, computed in float32, ``[B, T]``.
            valid: the tokens to check, bool ``[B, T]``.

        Raises:
            TopKError: naming the token and the response that contradict each other.
        """
        if self._picked is None:
            raise RuntimeError("verl's engine did not call the logits hook; fused kernels and pad_to_length skip it")
        picked, self._picked = self._picked, None
        responses, width = data["responses"], log_prob.shape[1]
        ids = _pad(_flat(data[TOPK_IDS]).long(), responses, width)
        rollout = _pad(_flat(data[ROLLOUT_TOPK_LOG_PROB]), responses, width)
        padded = _pad(picked, responses, width)
        k = ids.shape[-1]
        # log Z, from the sampled token's logit and the log-probability the loss uses.
        normaliser = padded[..., k] - log_prob.float()
        topk_log_prob = padded[..., :k] - normaliser.unsqueeze(-1)
        matches = ids == _pad(_flat(responses), responses, width).unsqueeze(-1)
        topk = TopK(ids, rollout.float(), topk_log_prob, matches.any(-1))
        tolerance = _TOLERANCE[rollout.dtype]
        mass = topk_log_prob.exp().sum(-1) + torch.where(topk.sampled_in_topk, 0.0, log_prob.float().exp())
        _check_values(topk, matches, rollout_log_prob.float(), mass, valid, self._vocabulary, tolerance, data)
        return topk


def response_markers(data: TensorDict) -> Tensor:
    """For every position of every sequence, 1 + the number of the response token it predicts, or 0; int64 ``[tokens]``.

    Response tokens are numbered over the micro-batch; the last position of a sequence predicts nothing.
    """
    lengths = data["responses"].offsets().diff()
    ends = (data["prompts"].offsets().diff() + lengths).cumsum(0)
    tokens = _flat(data["responses"]).shape[0]
    number = torch.arange(tokens, device=lengths.device)
    # A response's tokens are predicted from one position before its first to one before its last.
    shift = ends - 1 - lengths.cumsum(0)
    position = number + torch.repeat_interleave(shift, lengths, output_size=tokens)
    markers = torch.zeros(_flat(data["input_ids"]).shape[0], dtype=torch.int64, device=lengths.device)
    return markers.scatter_(0, position, number + 1)


def gather_logits(
    logits: Tensor,
    markers: Tensor,
    ids: Tensor,
    first_id: int,
    groups: list[ProcessGroup],
    temperature: Tensor | None = None,
) -> Tensor:
    """Logits of every response token at its ids, from this rank's shard and, summed over ``groups``, from all others'.

    Args:
        logits: ``[B', L, V']``, this rank's positions and ids ``first_id`` to ``first_id + V' - 1``.
        markers: ``[B', L]``, see :func:`response_markers`; every response token is marked on one rank of each group
            that divides positions.
        ids: int64 ``[N, K']``.
        groups: the groups that divide vocabulary or positions; each must be called by all its ranks.
        temperature: divides the values of each position, ``[B' * L]``.

    Returns:
        float32 ``[N, K']``, the same on every rank.
    """
    length = logits.shape[1]
    # Where each token's row lies on this rank, -1 if elsewhere; slot 0 collects the unmarked positions.
    place = torch.full((len(ids) + 1,), -1, dtype=torch.int64, device=ids.device)
    place = place.scatter_(0, markers.flatten(), torch.arange(markers.numel(), device=ids.device))[1:]
    here = place >= 0
    batch, position = place.clamp_min(0) // length, place.clamp_min(0) % length
    local = ids - first_id
    owned = here.unsqueeze(-1) & (local >= 0) & (local < logits.shape[-1])
    values = logits[batch.unsqueeze(-1), position.unsqueeze(-1), local.clamp(0, logits.shape[-1] - 1)].float()
    if temperature is not None:
        values = values / temperature[place.clamp_min(0)].unsqueeze(-1)
    values = torch.where(owned, values, 0.0)
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
    return values


def _flat(field: Tensor) -> Tensor:
    """All rows' tokens one after the other (a batch of equal lengths may arrive as a dense tensor)."""
    return field.values() if field.is_nested else field.flatten(0, 1)


def _pad(rows: Tensor, responses: Tensor, width: int) -> Tensor:
    """``[N, ...]``, one row a response token, as ``[B, width, ...]`` with zeros after each response."""
    offsets = _offsets(responses)
    column = torch.arange(width, device=rows.device)
    inside = column < offsets.diff().unsqueeze(-1)
    padded = rows.new_zeros((*inside.shape, *rows.shape[1:]))
    if len(rows):
        place = (offsets[:-1].unsqueeze(-1) + column).clamp_max(len(rows) - 1)
        padded = torch.where(inside.view(*inside.shape, *[1] * (rows.dim() - 1)), rows[place], padded)
    return padded


def _fsdp_layout(
    markers: Tensor, logits: Tensor, data: TensorDict, data_format: str | None
) -> tuple[Tensor, int, int, list[ProcessGroup]]:
    """Packed sequences; Ulysses sequence parallelism gives each rank an equal slice of the padded pack."""
    from verl.utils.ulysses import (
        get_ulysses_sequence_parallel_group,
        get_ulysses_sequence_parallel_world_size,
        slice_input_tensor,
    )

    markers = markers.unsqueeze(0)
    groups = []
    if get_ulysses_sequence_parallel_world_size() > 1:
        markers = slice_input_tensor(markers, dim=1)
        groups = [get_ulysses_sequence_parallel_group()]
    return markers, 0, logits.shape[-1], groups


def _megatron_layout(
    markers: Tensor, logits: Tensor, data: TensorDict, data_format: str | None
) -> tuple[Tensor, int, int, list[ProcessGroup]]:
    """Vocabulary divided over tensor parallelism; positions laid out and divided by verl's own preprocessing."""
    from megatron.core import parallel_state
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
    from verl.utils import tensordict_utils as tu

    nested = torch.nested.nested_tensor_from_jagged(markers, data["input_ids"].offsets())
    if data_format == "thd":
        markers = preprocess_thd_engine(nested, pre_process=True)[0]
    else:  # verl may pad every micro-batch to the longest sequence of its minibatch
        width = tu.get_non_tensor_data(data, "forced_max_seqlen", default=None)
        markers = preprocess_bshd_engine(nested, pre_process=True, forced_max_seqlen=width)[0]
    groups = []
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    if tensor_parallel > 1:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    if parallel_state.get_context_parallel_world_size() > 1:
        groups.append(parallel_state.get_context_parallel_group())
    shard = logits.shape[-1]
    first_id = parallel_state.get_tensor_model_parallel_rank() * shard
    return markers, first_id, shard * tensor_parallel, groups


def _check_rows(data: TensorDict) -> None:
    """Stop unless every response has a row for each of its tokens. Waits for the device once."""
    responses, *fields = (_lengths(data[name]) for name in ("responses", *TOPK_COLUMNS))
    wrong = torch.stack([responses != lengths for lengths in fields])
    if bool(wrong.any()):
        field, row = wrong.nonzero()[0].tolist()
        raise TopKError(
            f"{_name(data, row)} has {int(responses[row])} tokens, but {TOPK_COLUMNS[field]} has "
            f"{int(fields[field][row])} rows: the rollout's Top-K data were cut or shifted on their way"
        )


def _offsets(nested: Tensor) -> Tensor:
    """Where each row of a jagged tensor begins, and the end of the last one; torch's stubs do not know it."""
    return nested.offsets()  # type: ignore[attr-defined]


def _lengths(field: Tensor) -> Tensor:
    if field.is_nested:
        return _offsets(field).diff()
    return torch.full((field.shape[0],), field.shape[1], device=field.device)


def _check_values(
    topk: TopK,
    matches: Tensor,
    rollout_log_prob: Tensor,
    mass: Tensor,
    valid: Tensor,
    vocabulary: int,
    tolerance: float,
    data: TensorDict,
) -> None:
    """Stop unless every valid token's K rows can belong to it, under mu and under pi. Waits for the device once."""
    mu = topk.rollout_topk_log_prob
    stored = torch.where(matches, mu, 0.0).sum(-1)
    slack = tolerance * rollout_log_prob.abs().clamp_min(1.0)
    problems = {
        "an id is outside the vocabulary": ((topk.topk_ids < 0) | (topk.topk_ids >= vocabulary)).any(-1),
        "a log-probability is NaN or above 0": (~(mu <= tolerance)).any(-1),
        "the probabilities add up to more than 1": mu.exp().sum(-1) > 1.0 + (1e-3 if tolerance < 1e-5 else 1e-2),
        # NaN differences count as unequal.
        "the sampled token is stored with another log-probability than it was sampled with": topk.sampled_in_topk
        & ~((stored - rollout_log_prob).abs() <= slack),
        "the sampled token is missing although it is more likely than one of the K": ~topk.sampled_in_topk
        & ~(rollout_log_prob <= mu.amin(-1) + slack),
        # Only logits of another position than the sampled token's own give such a "distribution" (or NaN).
        "the policy's own probabilities add up to more than 1": ~(mass <= 1.0 + 1e-2),
    }
    found = torch.stack(list(problems.values())) & valid
    if not bool(found.any()):
        return
    kind, row, token = found.nonzero()[0].tolist()
    raise TopKError(
        f"{list(problems)[kind]}: token {token} of {_name(data, row)}; sampled id "
        f"{int(data['responses'][row][token])} at log-probability "
        f"{float(rollout_log_prob[row, token]):.6f}, Top-K ids {topk.topk_ids[row, token].tolist()} at "
        f"{[round(value, 6) for value in mu[row, token].tolist()]}. "
        f"{int(found.any(0).sum())} of {int(valid.sum())} tokens of this micro-batch are affected; training stopped, "
        "because a misplaced row would change the trust region silently"
    )


def _name(data: TensorDict, row: int) -> str:
    """How an error names a response: its row, and its problem and sample number where the batch has them."""
    name = f"response {row} of the micro-batch"
    details: list[str] = []
    for field in ("uid", "session_id"):
        values: Any = data.get(field, None)
        if values is not None:
            value = values[row]
            details.append(f"{field} {getattr(value, 'data', value)}")
    return f"{name} ({', '.join(details)})" if details else name
