"""verl's replay buffer, where finished responses are waited for: what of that is progress, and when to give up."""

from collections.abc import Callable
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from cppo_verl.run import progress


def watched(buffer: ReplayBuffer, poll_interval: float, limit: int) -> ReplayBuffer:
    """``buffer``, which looks for finished responses every ``poll_interval`` seconds and says what it has found.

    Args:
        limit: see :func:`giving_up`.
    """
    buffer.poll_interval = poll_interval
    buffer._sync_metadata_from_transfer_queue = progress.counting(
        buffer._sync_metadata_from_transfer_queue, lambda: _stored(buffer)
    )
    buffer._evict_terminal_groups = giving_up(buffer, limit)
    return buffer


def giving_up(buffer: ReplayBuffer, limit: int) -> Callable[..., Any]:
    """The buffer's eviction of what cannot be trained, which raises where nothing but failures comes any more.

    verl asks for another prompt for every group that failed, for ever: also where all servers are dead.

    Args:
        limit: groups that may fail one after the other without a group that is finished among them.
    """
    evict, seen, failed = buffer._evict_terminal_groups, set[str](), 0

    def evicted(global_steps: int, partition_id: str, reasons: tuple[set[str], ...]) -> Any:
        nonlocal seen, failed
        finished = set(buffer.finished_keys[partition_id])
        failed = len(reasons[2]) + (0 if finished - seen else failed)
        seen = finished
        if failed >= limit:
            raise RuntimeError(
                f"{failed} groups of responses in a row could not be generated or graded, and none could: training "
                "stopped. The log has each error. The last checkpoint is intact; run.resume=true continues from it"
            )
        return evict(global_steps, partition_id, reasons)

    return evicted


def _stored(buffer: ReplayBuffer) -> tuple[int, ...]:
    """How many responses and prompts there are, by how far they are; it changes with every response."""
    groups = (buffer.partitions, buffer.pending_keys, buffer.running_keys, buffer.finished_keys, buffer.failure_keys)
    return tuple(sum(map(len, group.values())) for group in groups)
