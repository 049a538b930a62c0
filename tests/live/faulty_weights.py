"""Checkpoint engines that fail from the second sync on: ``rollout.checkpoint_engine.backend=faulty_send`` etc."""

import asyncio

from verl.checkpoint_engine import CheckpointEngineRegistry

from cppo_verl.adapters.cpu.weights import SharedMemoryCheckpointEngine

PLANTED = "planted: the link is down"


class _Counting(SharedMemoryCheckpointEngine):
    syncs = 0

    def is_to_fail(self):
        self.syncs += 1
        return self.syncs > 1


@CheckpointEngineRegistry.register("faulty_send")
class FailsToSend(_Counting):
    async def send_weights(self, weights, global_steps=None):
        if self.is_to_fail():
            raise RuntimeError(PLANTED)
        await super().send_weights(weights, global_steps)


@CheckpointEngineRegistry.register("faulty_receive")
class FailsToReceive(_Counting):
    async def receive_weights(self, global_steps=None):
        if self.is_to_fail():
            raise RuntimeError(PLANTED)
        async for weight in super().receive_weights(global_steps):
            yield weight


@CheckpointEngineRegistry.register("faulty_silence")
class NeverSends(_Counting):
    async def send_weights(self, weights, global_steps=None):
        if self.is_to_fail():
            await asyncio.sleep(3600)
        await super().send_weights(weights, global_steps)


@CheckpointEngineRegistry.register("faulty_shape")
class ShowsTheServerAnotherShape(_Counting):
    """The server fails in the middle of receiving, while the worker beside it waits for its answer."""

    async def receive_weights(self, global_steps=None):
        failing = self.is_to_fail()
        async for name, weight in super().receive_weights(global_steps):
            yield name, weight[:1] if failing else weight
