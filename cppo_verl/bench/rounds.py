"""The process of ``cppo bench``: ``python -m cppo_verl.bench.rounds RUN_FOLDER``, all variants on one live stack.

A round trains one step of every variant (cppo_verl/bench/variants.py) in a random order, so that drift of the machine
meets all of them alike. One JSON line per step goes to bench.jsonl in the run folder.
"""

import json
import random
import sys
from functools import partial
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_torch_device
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from cppo_verl.adapters.actor.loss import TrustRegionLoss
from cppo_verl.adapters.actor.worker import TrustRegionActorWorker, TrustRegionTrainingWorker
from cppo_verl.adapters.driver.main import TaskRunner, run
from cppo_verl.adapters.driver.trainer import TrustRegionTrainer
from cppo_verl.bench.figures import STEPS_FILE
from cppo_verl.run import lifeline


class SwitchableTrainingWorker(TrustRegionTrainingWorker):
    """Ours where our loss is installed, verl's code path where verl's is; memory peaks are those of the update."""

    def train_mini_batch(self, data: TensorDict) -> TensorDict | None:
        get_torch_device().reset_peak_memory_stats()
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
        return PPOTrainerSync if self.variant.startswith("stock") else TrustRegionTrainer

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self.step_metrics = metrics
        return self._base().step(self, metrics, timing_raw)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        return self._base()._submit_batch_to_rollout(self, batch)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        return self._base()._balance_batch(self, batch, metrics, *args, **kwargs)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return self._base()._compute_advantage(self, batch, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return self._base()._update_actor(self, batch, metrics)

    def switch(self, variant: str) -> None:
        """Make the next step one of ``variant``."""
        self.variant = variant
        self.config.algorithm.rollout_correction.bypass_mode = variant != "stock-bypass-off"
        divergence = self.config.bench.binary if variant == "binary" else self.config.bench.divergence
        for node in ("divergence", "actor_rollout_ref.actor.policy_loss.divergence"):
            OmegaConf.update(self.config, node, divergence, merge=False)
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        loss = partial(ppo_loss, config=actor) if variant.startswith("stock") else TrustRegionLoss(actor)
        self.actor_rollout_wg.set_loss_fn(loss)


@ray.remote
class BenchRunner(TaskRunner.__ray_metadata__.modified_class):  # type: ignore[name-defined]
    """Trains ``bench.rounds`` rounds, and one before that whose compilation is not counted."""

    trainer_class = SwitchableTrainer

    def fit(self, config: DictConfig) -> None:
        order, variants = random.Random(config.run.seed), list(config.bench.variants)
        for number in range(config.bench.rounds + 1):
            for variant in order.sample(variants, len(variants)):
                self.trainer.switch(variant)
                self.trainer.total_training_steps = self.trainer.global_steps + 1
                self.trainer._init_dump_executor()
                self.trainer.fit(self.agent_loop_manager)
                self.trainer.global_steps -= 1  # fit() counts on after its last step
                if number > 0:
                    self._record(number, variant)

    def _record(self, number: int, variant: str) -> None:
        timing = {name: self.trainer.timing_raw[name] for name in ("step", "gen", "update_actor", "adv")}
        metrics, config = self.trainer.step_metrics, self.trainer.config
        responses = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
        # Per token: responses of one variant may be longer than those of another.
        timing["gen_per_token"] = timing["gen"] / (metrics["response_length/mean"] * responses)
        timing["peak_memory_gb"] = metrics["actor/perf/max_memory_allocated_gb"]
        with open(self.trainer.log.folder / STEPS_FILE, "a") as file:
            file.write(json.dumps({"round": number, "variant": variant, **timing}) + "\n")


if __name__ == "__main__":
    run(sys.argv[1], BenchRunner)
    lifeline.leave()
