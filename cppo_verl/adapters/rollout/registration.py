"""What ``rollout.name=vllm`` means to verl; apart from the server itself, which imports all of vLLM."""

from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry


def _load() -> type[RolloutReplica]:
    from cppo_verl.adapters.rollout.server import TopKReplica

    return TopKReplica


def register() -> None:
    """Make ``rollout.name=vllm`` mean ``TopKReplica`` in this process (the one that builds the trainer)."""
    RolloutReplicaRegistry.register("vllm", _load)
