"""The responses of a step in TransferQueue: their keys, groups and columns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from cppo_verl.adapters.columns import INSPECTED, RESPONSE_SEEDS, VERDICT
from cppo_verl.adapters.driver.step_metrics import accuracy
from cppo_verl.adapters.rollout.seeding import problem_key, response_seed


class ResponseKey(NamedTuple):
    """TransferQueue's name of a response: ``{group}_{sample}_{output}``."""

    group: str
    """verl's uid of the prompt as it was submitted in this step."""
    sample: int
    """Number of the response within its group."""
    output: int
    """Number of the output within one run of the agent loop; always 0 for a single turn."""

    @classmethod
    def parse(cls, key: str) -> "ResponseKey":
        group, sample, output = key.rsplit("_", 2)
        return cls(group, int(sample), int(output))


def is_padding(tag: dict[str, Any]) -> bool:
    """Whether verl added the row to fill a batch up, as a one-token copy of the first response."""
    return bool(tag.get("is_padding", False))


def column(batch: KVBatchMeta, field: str) -> list[Any]:
    """A per-row field that is not a tensor, in row order."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[field])
    return [getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value for value in data[field]]


def problems_and_samples(batch: KVBatchMeta) -> list[tuple[str, int]]:
    """(key of the problem, number of the sample) of every row: what a response is, in whatever order it came."""
    problems = (problem_key(raw_prompt) for raw_prompt in column(batch, "raw_prompt"))
    return [(problem, ResponseKey.parse(key).sample) for problem, key in zip(problems, batch.keys, strict=True)]


def zero_variance_groups(batch: KVBatchMeta, extra_fields: list[dict[str, Any]]) -> tuple[list[list[int]], int]:
    """Rows of each group whose responses all have the same ``acc`` (padding left out), and the number of all groups."""
    groups: dict[str, list[int]] = {}
    for row, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
        if not is_padding(tag):
            groups.setdefault(ResponseKey.parse(key).group, []).append(row)
    scores = [accuracy(fields) for fields in extra_fields]
    return [rows for rows in groups.values() if len({scores[row] for row in rows}) == 1], len(groups)


def clear_loss_mask(batch: KVBatchMeta, rows: list[int]) -> None:
    """Take rows out of the loss and of the token metrics; ``response_mask`` stays, verl's length metrics read it."""
    keys = [batch.keys[row] for row in rows]
    mask = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["loss_mask"])["loss_mask"]
    cleared = torch.nested.as_nested_tensor([torch.zeros_like(row) for row in mask.unbind()], layout=torch.jagged)
    fields = TensorDict({"loss_mask": cleared}, batch_size=len(keys))
    tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields)


def spread(used: list[bool], lengths: list[int], ranks: int, minibatches: int) -> list[int]:
    """An order of the rows in which the used ones of each minibatch are spread over the data-parallel ranks by length.

    verl gives each rank a contiguous part of the batch and divides that into minibatches; which rows a minibatch has,
    and how many of them a rank has, stays as it was.
    """
    of_rank = len(used) // ranks
    size = of_rank // minibatches
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for minibatch in range(minibatches):
        rows = [rank * of_rank + minibatch * size + place for rank in range(ranks) for place in range(size)]
        room, load = [size] * ranks, [0] * ranks
        for row in sorted(rows, key=lambda row: (not used[row], -lengths[row])):
            rank = min((rank for rank in range(ranks) if room[rank]), key=load.__getitem__)
            parts[rank].append(row)
            room[rank] -= 1
            load[rank] += lengths[row] if used[row] else 0
    return [row for part in parts for row in part]


def shorten_padding_rows(batch: KVBatchMeta, columns: Sequence[str]) -> None:
    """verl's padding rows have one token, but whole copies of the fields that verl does not know: of ``columns``."""
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if is_padding(tag)]
    if not keys or not columns:
        return
    stored = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=list(columns))
    shortened = {name: torch.stack([row[:1] for row in stored[name].unbind()]) for name in columns}
    tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=TensorDict(shortened, batch_size=len(keys)))


def put_response_seeds(batch: KVBatchMeta, run_seed: int, step: int) -> None:
    """One seed per response, so that shuffled weights depend on neither micro-batch nor order."""
    seeds = [response_seed(run_seed, step, problem, sample) for problem, sample in problems_and_samples(batch)]
    _put_values(batch, {RESPONSE_SEEDS: torch.tensor(seeds)})


def put_inspection(batch: KVBatchMeta, tokens: int | None) -> None:
    """The verdict of every response, and with ``tokens`` which of them, about so many tokens, a small dump keeps."""
    values = {VERDICT: torch.tensor([accuracy(fields) for fields in column(batch, "extra_fields")])}
    if tokens is not None:
        mask = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["loss_mask"])
        lengths = [int(row.sum()) for row in mask["loss_mask"].unbind()]
        groups: dict[str, list[int]] = {}
        for row, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
            if lengths[row] and not is_padding(tag):
                groups.setdefault(ResponseKey.parse(key).group, []).append(row)
        values[INSPECTED] = torch.zeros(len(batch), dtype=torch.int8)
        values[INSPECTED][some_groups(list(groups.values()), lengths, tokens)] = 1
    _put_values(batch, values)


def some_groups(groups: Sequence[Sequence[int]], lengths: Sequence[int], tokens: int) -> list[int]:
    """Rows of whole groups, spread over the step, of about ``tokens`` tokens; of one group that is longer its first."""
    total = sum(lengths[row] for rows in groups for row in rows)
    if not total:
        return []
    # The first minibatch is trained by the weights that sampled it, and nothing in it has moved.
    number = min(max(len(groups) * tokens // total, 1), len(groups))
    chosen = [row for place in range(number) for row in groups[(place + 1) * len(groups) // number - 1]]
    if number > 1:
        return chosen
    room = tokens
    kept: list[int] = []
    for row in chosen:
        if not kept or lengths[row] <= room:
            kept.append(row)
            room -= lengths[row]
    return kept


def _put_values(batch: KVBatchMeta, values: dict[str, torch.Tensor]) -> None:
    """Columns of one number a row, ``[B]`` each."""
    fields = TensorDict({name: value.unsqueeze(-1) for name, value in values.items()}, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    if batch.fields is not None:  # what the workers will fetch; None would mean everything
        batch.fields = [*batch.fields, *values]
