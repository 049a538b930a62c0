"""How weights reach vLLM servers of their own without an accelerator: verl's checkpoint engine "shared_memory".

verl's other engines need one: NCCL sends from GPU to GPU, NIXL imports cupy and pins memory. Actor and servers are on
one machine here, whose memory both see. Loaded by ``rollout.checkpoint_engine.custom_backend_module``.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import torch
from torch import Tensor
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

_LONGEST_WAIT = 600  # seconds, for all weights to be gathered and written


@CheckpointEngineRegistry.register("shared_memory")
class SharedMemoryCheckpointEngine(CheckpointEngine):
    """The first actor rank writes all weights to a file in memory, which the servers' workers map.

    The file has no name and ends with its processes, however they end; other users cannot open it.

    Args:
        bucket_size: verl's, not needed here.
        is_master: this is the first actor rank.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._is_master = is_master
        self._file, self._path = -1, ""

    def prepare(self) -> str | None:
        """Where the others find the first rank's new file."""
        if not self._is_master:
            return None
        self.finalize()  # what a sync that failed has left
        self._file = os.memfd_create("cppo-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[str | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        path = next(name for name in metadata if name)
        return {"path": [path] * actor_wg_world_size}, {"path": [path] * rollout_world_size}

    def init_process_group(self, path: str) -> None:
        self._path = path

    async def send_weights(self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None) -> None:
        # Every rank takes part in gathering them.
        gathered = {name: tensor.detach().cpu().clone() for name, tensor in weights if self._is_master}
        if self._is_master:
            with open(self._file, "wb", closefd=False) as file:
                torch.save(gathered, file)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)  # complete

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Tensor]]:
        """Raises TimeoutError where the actor has written none."""
        until = time.monotonic() + _LONGEST_WAIT
        with open(self._path, "rb") as file:
            while not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
                if time.monotonic() > until:
                    raise TimeoutError(f"the actor has not written the weights of step {global_steps}")
                await asyncio.sleep(0.01)
        weights = torch.load(self._path, mmap=True, weights_only=True)
        for name in list(weights):
            yield name, weights.pop(name)

    def finalize(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
