"""Whether the Ray cluster has what the run is about to ask for: what Ray cannot place it waits for without a word."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

# verl reserves so many CPU slots with every device (ResourcePoolManager.max_colocate_count).
_SLOTS_A_DEVICE = 3


def server_devices(config: DictConfig) -> int:
    """Devices that only generate, beside those that train: of vLLM servers of their own (``mode=separate_async``)."""
    if config.trainer.v1.trainer_mode != "separate_async":
        return 0
    rollout = config.actor_rollout_ref.rollout
    return rollout.nnodes * rollout.n_gpus_per_node


def require_room(config: DictConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError unless enough of the alive ``nodes`` (``ray.nodes()``) have the devices and CPU slots."""
    wanted, devices = config.trainer.nnodes, config.trainer.n_gpus_per_node
    slots = _SLOTS_A_DEVICE * devices
    alive = [node for node in nodes if node["Alive"]]
    fitting = [node for node in alive if _has(node, "GPU") >= devices and _has(node, "CPU") >= slots]
    found = "; ".join(
        f"{node['NodeManagerAddress']}: {_has(node, 'GPU'):g} GPUs, {_has(node, 'CPU'):g} CPU slots" for node in alive
    )
    if len(fitting) < wanted:
        raise RuntimeError(
            f"trainer.nnodes={wanted} asks for as many nodes with {devices} GPUs (trainer.n_gpus_per_node) and {slots} "
            f"CPU slots each; Ray has {found}. Start more nodes, ask for less, or give Ray more slots "
            "(ray start --num-cpus, ray_kwargs.ray_init.num_cpus)"
        )
    generating = server_devices(config)
    in_all = wanted * devices + generating
    if sum(_has(node, "GPU") for node in alive) < in_all:
        raise RuntimeError(
            f"mode=separate_async asks for {wanted * devices} GPUs to train and {generating} to generate "
            f"(actor_rollout_ref.rollout.nnodes, n_gpus_per_node); Ray has {found}. Start more nodes, or ask for less"
        )
    # Agent loops, reward workers and the queue are placed by slots that are free.
    if sum(_has(node, "CPU") for node in alive) <= wanted * slots:
        raise RuntimeError(
            f"the devices take all CPU slots of the cluster ({found}), and agent loops, reward workers and the queue "
            "need one more: ray start --num-cpus, or ray_kwargs.ray_init.num_cpus"
        )


def _has(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0))
