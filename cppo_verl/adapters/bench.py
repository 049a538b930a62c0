"""Seconds per step of a method against stock verl GRPO, in turn on one live stack: ``cppo bench``.

A round trains one step of every variant in a random order, so that drift of the machine meets all of them alike:

- ``ours``: the configured method through our worker and trainer;
- ``stock``: verl's own ``ppo_loss``, worker and trainer code, bypass_mode on: the same number of forward passes;
- ``stock, bypass off``: the same with the old policy recomputed: one forward pass more.

One JSON line per step goes to bench.jsonl in the run folder.
"""

import json
import random
import sys
from functools import partial
from typing import Any

import ray
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from cppo_verl.adapters.actor import TrustRegionActorWorker, TrustRegionTrainingWorker
from cppo_verl.adapters.loss import TrustRegionLoss
from cppo_verl.adapters.main import TaskRunner, run
from cppo_verl.adapters.trainer import TrustRegionTrainer
from cppo_verl.run_log import BENCH

VARIANTS = ("ours", "stock", "stock, bypass off")


class SwitchableTrainingWorker(TrustRegionTrainingWorker):
    """Ours where our loss is installed, verl's code path where verl's is."""

    def train_mini_batch(self, data: TensorDict) -> TensorDict | None:
        base = TrustRegionTrainingWorker if isinstance(self.loss_fn, TrustRegionLoss) else TrainingWorker
        return base.train_mini_batch(self, data)

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        base = TrustRegionTrainingWorker if isinstance(self.loss_fn, TrustRegionLoss) else TrainingWorker
        return base.train_batch(self, data)


class SwitchableActorWorker(TrustRegionActorWorker):
    actor_worker_cls = SwitchableTrainingWorker


class SwitchableTrainer(TrustRegionTrainer):
    """Our trainer or verl's, by ``variant``; only what a run always shares (log, polling interval) stays ours."""

    variant = "ours"

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping[Role.ActorRollout] = ray.remote(SwitchableActorWorker)

    def _base(self) -> type[PPOTrainerSync]:
        return TrustRegionTrainer if self.variant == "ours" else PPOTrainerSync

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        return self._base().step(self, metrics, timing_raw)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        return self._base()._balance_batch(self, batch, metrics, *args, **kwargs)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return self._base()._compute_advantage(self, batch, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return self._base()._update_actor(self, batch, metrics)

    def switch(self, variant: str) -> None:
        """Make the next step one of ``variant``."""
        self.variant = variant
        self.config.algorithm.rollout_correction.bypass_mode = variant != "stock, bypass off"
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        loss = TrustRegionLoss(actor) if variant == "ours" else partial(ppo_loss, config=actor)
        self.actor_rollout_wg.set_loss_fn(loss)


@ray.remote
class BenchRunner(TaskRunner.__ray_metadata__.modified_class):
    """Trains ``bench.rounds`` rounds, and one before that whose compilation is not counted."""

    trainer_class = SwitchableTrainer

    def fit(self, config: DictConfig) -> None:
        order = random.Random(config.run.seed)
        for number in range(config.bench.rounds + 1):
            for variant in order.sample(VARIANTS, len(VARIANTS)):
                self.trainer.switch(variant)
                self.trainer.total_training_steps = self.trainer.global_steps + 1
                self.trainer._init_dump_executor()
                self.trainer.fit(self.agent_loop_manager)
                self.trainer.global_steps -= 1  # fit() counts on after its last step
                if number > 0:
                    self._record(number, variant)

    def _record(self, number: int, variant: str) -> None:
        timing = {name: self.trainer.timing_raw[name] for name in ("step", "gen", "update_actor", "adv")}
        with open(self.trainer.log.folder / BENCH, "a") as file:
            file.write(json.dumps({"round": number, "variant": variant, **timing}) + "\n")


if __name__ == "__main__":
    run(sys.argv[1], BenchRunner)
