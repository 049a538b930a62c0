"""verl's trainer modes (``mode=``), each with what the modes share: ``TrustRegionTraining``."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.workers.rollout.llm_server import LLMServerClient

from cppo_verl.adapters import compat
from cppo_verl.adapters.actor.stale_worker import StaleActorWorker
from cppo_verl.adapters.columns import ROLLOUT_VERSION
from cppo_verl.adapters.driver.trainer import TrustRegionTrainer, TrustRegionTraining
from cppo_verl.adapters.rollout.partial import DirectPartialRolloutClient, PartialRolloutClient
from cppo_verl.grading import OUTCOMES
from cppo_verl.run import progress


class AsyncTraining(TrustRegionTraining):
    """Responses may be interrupted by a weight update; each of their tokens tells which weights sampled it."""

    client = PartialRolloutClient
    client_of_one = DirectPartialRolloutClient

    @property
    def token_columns(self) -> tuple[str, ...]:
        return (*super().token_columns, ROLLOUT_VERSION)


class ColocateAsyncTrainer(AsyncTraining, PPOTrainerColocateAsync):
    """Generation and training by turns on the same devices; what is not finished when a batch is goes on afterwards."""


class SeparateAsyncTrainer(AsyncTraining, PPOTrainerSeparateAsync):
    """Generation on devices of its own, all the time; a step is several updates, each on what is ready."""

    def _setup(self) -> None:
        compat.let_separate_async_log()
        super()._setup()

    def get_llm_client(self) -> LLMServerClient:
        return self._client_of(self.standalone_server_manager, alone=not self._enable_hybrid_replicas)

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self._updates: list[dict[str, Any]] = []
        batch = super().step(metrics, timing_raw)
        # verl has averaged them over the updates by its own rules.
        metrics.update(of_a_step(self._updates))
        return batch

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        self._updates.append(dict(metrics))
        return batch


class StaleTrainer(AsyncTraining, PPOTrainerSync):
    """In lockstep, but the servers generate with the weights of ``run.staleness`` steps ago; for experiments.

    A run, or what is resumed of one, begins with what it has: the first steps are less stale.
    """

    worker = StaleActorWorker

    def on_init_end(self) -> None:
        self._versions = [self.global_steps]
        self.actor_rollout_wg.save_model_to_cpu(self.global_steps)
        super().on_init_end()

    def on_step_end(self) -> None:
        self._versions.append(self.global_steps)
        self.actor_rollout_wg.save_model_to_cpu(self.global_steps)
        while len(self._versions) > self.run.staleness + 1:
            self.actor_rollout_wg.clear_cpu_model(self._versions.pop(0))
        with marked_timer("update_weights", self.timing_raw, color="red"):
            self._send(self._versions[0])

    def on_validate_begin(self) -> None:
        super().on_validate_begin()
        self.checkpoint_manager.sleep_replicas()
        self._send(self._versions[-1])

    def on_validate_end(self) -> None:
        self.checkpoint_manager.sleep_replicas()
        self._send(self._versions[0])

    def _send(self, version: int) -> None:
        """To servers that sleep."""
        progress.phase("weight sync")
        newest = self._versions[-1]
        if version != newest:
            self.actor_rollout_wg.restore_model_from_cpu(version)
        self.checkpoint_manager.update_weights(version)
        if version != newest:
            self.actor_rollout_wg.restore_model_from_cpu(newest)


# What adds up over the updates of a step; the actor's token metrics go on from update to update (``CONTINUES``).
_COUNTS = (
    *(f"grading/{name}" for name in OUTCOMES),
    *("groups/total", "groups/zero_variance", "rollout/missing_responses", "update/skipped_minibatches"),
)
_GOING_ON = ("trust_region/", "bound/", "divergence/", "policy/", "staleness/", "rollout/log_prob")


def of_a_step(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Our metrics of a step from those of its updates: counts added up, token metrics as they ended, rates anew."""
    if not updates:
        return {}
    names = {name for update in updates for name in update}
    metrics = {name: sum(update.get(name, 0) for update in updates) for name in _COUNTS if name in names}
    metrics |= {name: value for name, value in updates[-1].items() if name.startswith(_GOING_ON)}
    answers = sum(metrics.get(f"grading/{name}", 0) for name in OUTCOMES)
    if answers:
        metrics["grading/no_answer_rate"] = metrics["grading/no_answer"] / answers
    return metrics


TRAINERS: dict[str, type[TrustRegionTraining]] = {
    "sync": TrustRegionTrainer,
    "colocate_async": ColocateAsyncTrainer,
    "separate_async": SeparateAsyncTrainer,
}


def trainer_of(config: DictConfig) -> type[TrustRegionTraining]:
    return StaleTrainer if config.run.staleness else TRAINERS[config.trainer.v1.trainer_mode]
