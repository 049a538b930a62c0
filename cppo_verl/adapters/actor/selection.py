"""Which rows of a minibatch take part in its update: those with a token in the loss.

Rows of skipped groups (``run.mask_std_0``) have none: their loss and gradient are 0, their forward and backward passes
cost as much as any. They are left out before the minibatch is divided into micro-batches; the loss is normalised by the
whole minibatch as before (``global_batch_size``, and ``batch_num_tokens``, which counts tokens in the loss). A few of
them stay where data-parallel ranks would otherwise run unequal numbers of micro-batches: their collectives must match.
"""

from typing import NamedTuple

import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from torch.distributed import ProcessGroup
from verl.utils import tensordict_utils as tu


class Selection(NamedTuple):
    """What is left of one rank's part of a minibatch."""

    data: TensorDict | None
    """None where no rank has a row with a token in the loss."""
    trained: int
    """Rows with a token in the loss, over all ranks."""
    rows: int
    """All rows of the minibatch, over all ranks."""


def select_rows(data: TensorDict, group: ProcessGroup | None) -> Selection:
    """Leave out the rows without a token in the loss (a collective over the data-parallel ``group``).

    Args:
        data: this rank's rows, with ``loss_mask`` and ``input_ids`` (nested) and the settings of its micro-batches.
    """
    lengths = _row_sums(torch.ones_like(data["input_ids"]))
    used = _row_sums(data["loss_mask"]) > 0
    batches = _micro_batches(data, lengths[used])
    most, trained, rows = _agree(group, batches, int(used.sum()), len(used), lengths.device)
    if trained == 0:
        return Selection(None, 0, rows)
    if trained == rows:
        return Selection(data, trained, rows)
    if tu.get_non_tensor_data(data, key="use_dynamic_bsz", default=True):
        wanted, size = max(int(used.sum()), most), None
    else:
        size = max(-(-int(used.sum()) // most), 1)
        wanted = most * size
    kept = used.clone()
    # Whoever fills up costs least when short.
    fillers = torch.argsort(torch.where(used, torch.iinfo(torch.int64).max, lengths), stable=True)
    kept[fillers[: wanted - int(used.sum())]] = True
    selected = tu.index_select_tensor_dict(data, kept.nonzero()[:, 0])
    if size is not None:
        tu.assign_non_tensor(selected, micro_batch_size_per_gpu=size)
    tu.assign_non_tensor(selected, global_token_num=NonTensorData(_gathered(lengths[kept].tolist(), group)))
    return Selection(selected, trained, rows)


def _row_sums(field: Tensor) -> Tensor:
    """Sum of each row of a jagged (or dense) tensor, int64 ``[B]``."""
    if not field.is_nested:
        return field.flatten(1).sum(-1).long()
    return torch.stack([row.sum() for row in field.unbind()]).long()


def _micro_batches(data: TensorDict, lengths: Tensor) -> int:
    """How many micro-batches verl would make of rows of these lengths."""
    if tu.get_non_tensor_data(data, key="use_dynamic_bsz", default=True):
        room = data["max_token_len_per_gpu"] * tu.get_non_tensor_data(data, key="sp_size", default=1)
        return min(len(lengths), -(-int(lengths.sum()) // room))
    return -(-len(lengths) // data["micro_batch_size_per_gpu"])


def _agree(
    group: ProcessGroup | None, batches: int, trained: int, rows: int, device: torch.device
) -> tuple[int, int, int]:
    """(largest number of micro-batches, trained rows, all rows) over the ranks."""
    most, sums = torch.tensor(batches, device=device), torch.tensor([trained, rows], device=device)
    if group is not None:
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        torch.distributed.all_reduce(sums, group=group)
    return int(most), int(sums[0]), int(sums[1])


def _gathered(lengths: list[int], group: ProcessGroup | None) -> list[int]:
    """Sequence lengths of all ranks, from which verl counts the work done."""
    if group is None:
        return lengths
    parts: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather_object(parts, lengths, group=group)
    return [length for part in parts for length in part]
