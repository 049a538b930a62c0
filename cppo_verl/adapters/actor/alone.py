"""verl's engine with a loss of ours in the process that asks: no Ray, a process group of one."""

import os
import socket

from omegaconf import DictConfig
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import TrainingWorkerConfig

from cppo_verl.adapters.actor.loss import TrustRegionLoss
from cppo_verl.adapters.actor.worker import TrustRegionTrainingWorker


def join_process_group() -> None:
    """verl's engine wants a process group, be it of one; its address comes from the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def settings_of(config: DictConfig) -> TrainingWorkerConfig:
    """What verl's actor worker gives its engine for training, from a composed configuration."""
    node = config.actor_rollout_ref.actor
    actor = omega_conf_to_dataclass(node)
    actor.engine.use_dynamic_bsz = node.use_dynamic_bsz
    actor.engine.max_token_len_per_gpu = node.ppo_max_token_len_per_gpu
    actor.engine.micro_batch_size_per_gpu = node.ppo_micro_batch_size_per_gpu
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=omega_conf_to_dataclass(config.actor_rollout_ref.model),
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )


def actor_of(config: DictConfig) -> TrustRegionTrainingWorker:
    """The actor of a run of that configuration, its model loaded; :func:`join_process_group` comes first."""
    worker = TrustRegionTrainingWorker(settings_of(config))
    worker.reset()
    worker.set_loss_fn(TrustRegionLoss(omega_conf_to_dataclass(config.actor_rollout_ref.actor)))
    return worker
