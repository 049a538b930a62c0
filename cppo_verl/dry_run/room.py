"""What a run asks for and this machine does not have: Ray would wait for it for ever, or the kernel end the run."""

import os
from collections.abc import Iterator

from omegaconf import DictConfig

from cppo_verl.adapters.driver.placement import server_devices
from cppo_verl.dry_run.memory import GIB, estimate
from cppo_verl.dry_run.model import find_model
from cppo_verl.problems import Problem, about
from cppo_verl.run.machine import gpus, has_gpu, joined_cluster, memory

# Without a GPU: Ray, driver, queue, agent loop and reward worker; and what an actor worker and a vLLM server with its
# two processes take beside the model. The quickstart's run, whose model is next to nothing, peaked at 8 GiB.
_PROCESSES, _A_DEVICE = 5 * GIB, 3 * GIB


def lacking(config: DictConfig) -> Iterator[Problem]:
    """Devices and memory. Not where the run joins a cluster: what that has the driver looks at when it is there."""
    if joined_cluster(config.ray_kwargs.ray_init.get("address")) is not None:
        return
    trainer = config.trainer
    if trainer.nnodes > 1:
        yield about(
            "trainer.nnodes",
            f"={trainer.nnodes}: this machine is one node; start Ray on all of them and set RAY_ADDRESS "
            "(docs/cluster.md), or trainer.nnodes=1",
            only_here=True,
        )
    if trainer.device == "cpu":
        yield from _memory(config)
    elif not has_gpu():
        yield about(
            "trainer.device",
            f"={trainer.device}: this machine has no NVIDIA GPU; join a cluster that has (RAY_ADDRESS=HOST:6379), or "
            "train a small model without: recipe=small platform=cpu",
            only_here=True,
        )
    elif (found := _visible()) is not None and found < (generating := server_devices(config)) + trainer.n_gpus_per_node:
        left = max(found - generating, 1)
        beside = f" beside the {generating} that generate" if generating else ""
        yield about(
            "trainer.n_gpus_per_node",
            f"={trainer.n_gpus_per_node}{beside}, but this machine has {found}: trainer.n_gpus_per_node={left}",
            only_here=True,
        )


def _visible() -> int | None:
    """GPUs of this machine that the run may use; None where nvidia-smi does not tell."""
    listed = gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not listed:
        return None
    return len(listed) if chosen is None else min(len(listed), len([name for name in chosen.split(",") if name]))


def _memory(config: DictConfig) -> Iterator[Problem]:
    """Of a run on CPUs: every device is an actor worker and a vLLM server."""
    model, _ = find_model(config.actor_rollout_ref.model)
    devices = config.trainer.n_gpus_per_node + server_devices(config)
    needed: float = _PROCESSES + devices * _A_DEVICE
    if model is not None:
        cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1) * GIB
        moments = vars(estimate(config, model, None)).values()
        needed += devices * (max(parts.total for parts in moments) + cache)
    total = memory()[0]
    if needed > total:
        of_model = "" if model is None else f" with a model of {model.parameters / 1e6:,.0f} million parameters"
        remedy = (
            "trainer.n_gpus_per_node=1 (each is a trainer and a vLLM server)"
            if devices > 1
            else "fewer tokens a micro-batch (actor_rollout_ref.actor.ppo_max_token_len_per_gpu or "
            "ppo_micro_batch_size_per_gpu), or a smaller model"
        )
        yield about(
            "actor_rollout_ref.model.path",
            f": the run{of_model} takes about {needed / GIB:.0f} GiB, and this machine has {total / GIB:.0f}; {remedy}",
            only_here=True,
        )
