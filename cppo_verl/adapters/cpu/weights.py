"""How weights reach vLLM servers of their own without an accelerator: verl's checkpoint engine "shared_memory".

verl's other engines need one: NCCL sends from GPU to GPU, NIXL imports cupy and pins memory. Actor and servers are on
one machine here, whose memory both see. Loaded by ``rollout.checkpoint_engine.custom_backend_module``.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

from cppo_verl.adapters import store
from cppo_verl.run.machine import SHARED_MEMORY

_LONGEST_WAIT = 600  # seconds, for all weights to be gathered and written


@CheckpointEngineRegistry.register("shared_memory")
class SharedMemoryCheckpointEngine(CheckpointEngine):
    """The first actor rank writes all weights to a file in memory, which the servers' workers map.

    Args:
        bucket_size: verl's, not needed here.
        is_master: this is the first actor rank.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        store.listen_on_its_host()  # verl's worker beside a server opens a store next
        self._is_master = is_master
        self._folder = Path()

    def prepare(self) -> str | None:
        """The first rank's new folder, which only this user can read."""
        return tempfile.mkdtemp(prefix="cppo-weights-", dir=SHARED_MEMORY) if self._is_master else None

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[str | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        folder = next(name for name in metadata if name)
        return {"folder": [folder] * actor_wg_world_size}, {"folder": [folder] * rollout_world_size}

    def init_process_group(self, folder: str) -> None:
        self._folder = Path(folder)

    async def send_weights(self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None) -> None:
        # Every rank takes part in gathering them.
        gathered = {name: tensor.detach().cpu().clone() for name, tensor in weights if self._is_master}
        if self._is_master:
            torch.save(gathered, self._folder / "partial")
            (self._folder / "partial").rename(self._folder / "weights")

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Tensor]]:
        """Raises TimeoutError where the actor has written none."""
        until = time.monotonic() + _LONGEST_WAIT
        while not (self._folder / "weights").exists():
            if time.monotonic() > until:
                raise TimeoutError(f"the actor has not written the weights of step {global_steps} to {self._folder}")
            await asyncio.sleep(0.01)
        weights = torch.load(self._folder / "weights", mmap=True, weights_only=True)
        for name in list(weights):
            yield name, weights.pop(name)

    def finalize(self) -> None:
        if self._is_master:
            shutil.rmtree(self._folder)
