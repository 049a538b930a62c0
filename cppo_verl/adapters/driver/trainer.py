"""verl's V1 trainers with what CPPO needs: our worker, mask_std_0, per-response seeds, the run's log.

Here is what the modes share, and the synchronous trainer; the asynchronous ones are in ``modes``.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
import transfer_queue as tq
from hydra.utils import instantiate
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.tracking import Tracking
from verl.workers.rollout.llm_server import LLMServerClient, LLMServerManager

from cppo_verl.adapters.actor.worker import TrustRegionActorWorker
from cppo_verl.adapters.columns import (
    CONTINUES,
    DUMP_DIR,
    POLICY_VERSION,
    TOPK,
    TOPK_COLUMNS,
    TRAIN_ALL_ROWS,
)
from cppo_verl.adapters.driver import placement
from cppo_verl.adapters.driver.replay import watched
from cppo_verl.adapters.driver.step_metrics import (
    aime_mean,
    outcome_metrics,
    require_finite_gradient,
    require_finite_rewards,
)
from cppo_verl.adapters.driver.trajectories import (
    ResponseKey,
    clear_loss_mask,
    column,
    is_padding,
    problems_and_samples,
    put_inspection,
    put_response_seeds,
    shorten_padding_rows,
    spread,
    zero_variance_groups,
)
from cppo_verl.adapters.rollout.client import DirectClient
from cppo_verl.adapters.rollout.workers import TrustRegionAgentLoopManager
from cppo_verl.checkpoint import retention
from cppo_verl.run import progress
from cppo_verl.run.log import RunLog, accuracies, read_metrics, validation_score

Started = TypeVar("Started")

# Families of metrics that our actor returns; verl prefixes everything an actor returns with "actor/".
_OUR_FAMILIES = ("trust_region/", "bound/", "divergence/", "rollout/", "policy/", "update/", "staleness/")


class LoggedTracking:
    """verl's Tracking with every record also appended to the run's own metrics file.

    ``unfinished`` is what is known of the step that a run resumes at, whose validation is still to come.
    """

    def __init__(self, tracking: Tracking, log: RunLog, unfinished: dict[str, Any]) -> None:
        self._tracking, self._log, self._unfinished = tracking, log, unfinished

    def log(self, data: dict[str, Any], step: int) -> None:
        data = {**self._unfinished, **data}
        self._unfinished = {}
        self._log.metrics(step, data)
        # What was read from a file has null for NaN.
        self._tracking.log(data={name: value for name, value in data.items() if value is not None}, step=step)

    def finish(self, exit_code: int = 0) -> None:
        self._tracking.finish(exit_code=exit_code)


class TrustRegionTraining(PPOTrainer):
    """One instance drives a run. Everything not overridden here is verl's; a mode is this and verl's trainer of it."""

    # How agent loops reach the vLLM servers, and the only server there is.
    client: type[LLMServerClient] = LLMServerClient
    client_of_one: type[DirectClient] = DirectClient
    worker: type[TrustRegionActorWorker] = TrustRegionActorWorker

    def __init__(self, config: DictConfig) -> None:
        self.run = config.run
        self.log = RunLog(f"{config.run.dir}/{config.run.name}")
        self._tracking: LoggedTracking | None = None
        self._validation_samples: dict[str, Any] | None = None
        self._step_metrics: dict[str, Any] = {}
        self._step_batch: KVBatchMeta | None = None
        self._step_started = 0.0
        self._unfinished: dict[str, Any] = {}
        self._unlogged: tuple[int, dict[str, Any]] | None = None
        # verl's own rotation forgets at a restart what was saved before it, and does not know the best checkpoint.
        self._keep, config.trainer.max_actor_ckpt_to_keep = config.trainer.max_actor_ckpt_to_keep, None
        super().__init__(config)

    # fit() creates verl's Tracking itself, by assigning self.logger; this is where the run's own file joins in.
    @property
    def logger(self) -> LoggedTracking | None:
        return self._tracking

    @logger.setter
    def logger(self, tracking: Tracking) -> None:
        self._tracking = LoggedTracking(tracking, self.log, self._unfinished)
        if self._unlogged:
            step, metrics = self._unlogged
            self._tracking.log(metrics, step)

    # verl starts one kind of process after the other, and each spends the most of its start importing. This assignment
    # tells that it is about to wait for the vLLM servers, which take the longest and one core.
    @property
    def reward_loop_manager(self) -> RewardLoopManager:
        return self._rewards

    @reward_loop_manager.setter
    def reward_loop_manager(self, rewards: RewardLoopManager) -> None:
        self._rewards = rewards
        self._agent_loops = _beside(self._start_agent_loops, rewards)
        self._server_prepared.result()

    def _start_agent_loops(self, rewards: RewardLoopManager) -> TrustRegionAgentLoopManager | None:
        """TransferQueue, and the agent loop workers, which store there what they generate."""
        tq.init(self.config.transfer_queue)
        chosen = self.config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
        if chosen != f"{TrustRegionAgentLoopManager.__module__}.{TrustRegionAgentLoopManager.__name__}":
            return None
        return TrustRegionAgentLoopManager.create(
            config=self.config, llm_client=None, reward_loop_worker_handles=rewards.reward_loop_worker_handles
        )

    @property
    def agent_loops(self) -> TrustRegionAgentLoopManager | None:
        """The agent loop workers, once they have been started; None where others than ours are chosen."""
        return self._agent_loops.result()

    def _build_replay_buffer(self) -> ReplayBuffer:
        return watched(super()._build_replay_buffer(), self.run.poll_interval, self.config.data.train_batch_size)

    def get_llm_client(self) -> LLMServerClient:
        return self._client_of(self.llm_server_manager, alone=True)

    def _client_of(self, servers: LLMServerManager, alone: bool) -> LLMServerClient:
        """For agent loops. ``alone``: no other servers will join these behind their load balancer."""
        if not alone or len(servers.server_handles) > 1:
            return servers.get_client(self.client)
        # Before it has imported all of verl.
        ray.kill(servers.global_load_balancer)
        address, server = servers.server_addresses[0], servers.server_handles[0]
        return servers.get_client(self.client_of_one, address=address, server=server)

    def _init_resource_pool_mgr(self) -> None:
        placement.require_room(self.config, ray.nodes())
        super()._init_resource_pool_mgr()
        self._server_prepared = _beside(_prepare_server, self.config)
        for role in (Role.Actor, Role.RefPolicy, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.worker)

    def _setup(self) -> None:
        super()._setup()
        self.log.event("initialized", step=self.global_steps, total_steps=self.total_training_steps)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._restore_history(self.global_steps)

    def _restore_history(self, step: int) -> None:
        """Metrics and validation samples as they were at ``step``; its validation is repeated if it had not ended."""
        for path in (self.log.folder / "validation").glob("*.jsonl"):
            if path.stem.isdecimal() and int(path.stem) > step:
                path.unlink()
        settings = self.config.trainer
        folder = retention.step_folder(settings.default_local_dir, step)
        own = settings.resume_from_path == str(folder)
        if not step or not own:
            self.log.forget_after(-1)
            return
        logged = {
            name: value
            for name, value in read_metrics(self.log.folder).get(step, {}).items()
            if name not in ("step", "time")
        }
        saved = retention.metrics_of(folder)
        due = settings.test_freq > 0 and (step % settings.test_freq == 0 or step >= self.total_training_steps)
        settings.val_before_train = due and not accuracies(logged)
        if settings.val_before_train:
            self.log.forget_after(step - 1)
            self._unfinished = {**saved, **logged}
        else:
            self.log.forget_after(step)
            if not logged:
                self._unlogged = step, saved

    def on_init_end(self) -> None:
        progress.phase("weight sync")
        super().on_init_end()

    def on_step_end(self) -> None:
        progress.phase("weight sync")
        super().on_step_end()

    def on_validate_begin(self) -> None:
        progress.phase("validation")
        self.log.event("validating", step=self.global_steps)

    def on_sample_begin(self) -> None:
        progress.phase("generation")
        super().on_sample_begin()
        self.log.event("generating", step=self.global_steps)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        # Read by our agent loop. Validation batches do not pass here: they ask for no Top-K log-probabilities. One for
        # each row: what all rows share, verl does not keep of a prompt that a resumed run submits again.
        tu.assign_non_tensor_stack(batch, TOPK, [self.config.divergence.k] * len(batch))
        return super()._submit_batch_to_rollout(batch)

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self._step_metrics, self._step_started = metrics, time.time()
        self._step_batch = super().step(metrics, timing_raw)
        return self._step_batch

    def _dump_generations(self, **samples: Any) -> None:
        if samples["dump_path"] == self.config.trainer.get("validation_data_dir"):
            self._validation_samples = samples  # written by _val_metrics_update, which knows the data sources
        else:
            super()._dump_generations(**samples)

    def _val_metrics_update(self, data_sources: list, sample_uids: list, *args: Any, **kwargs: Any) -> dict[str, float]:
        samples, self._validation_samples = self._validation_samples, None
        if samples is not None:
            source = dict(zip(sample_uids, data_sources, strict=True))
            columns = samples["reward_extra_infos_dict"]
            columns["data_source"] = [str(source[ResponseKey.parse(key).group]) for key in columns["uid"]]
            super()._dump_generations(**samples)
        metrics = super()._val_metrics_update(data_sources, sample_uids, *args, **kwargs)
        # verl counts a response that could not be generated or graded as wrong; here it is reported as well.
        expected = sum((kwargs.get("expected_acc_counts") or {}).values())
        return metrics | aime_mean(metrics) | {"validation/missing_responses": max(expected - len(sample_uids), 0)}

    def _save_checkpoint(self) -> None:
        progress.phase("saving")
        self.log.event("saving", step=self.global_steps)
        self._prune()  # room for the new one
        folder = retention.step_folder(self.config.trainer.default_local_dir, self.global_steps)
        if folder.is_symlink():  # verl would write to where it leads
            raise FileExistsError(f"{folder} is a symbolic link, which no run replaces: move it away, then resume")
        try:
            retention.remove(folder)  # what an attempt that was killed left there
            super()._save_checkpoint()
            retention.complete(folder, self.global_steps, self._metrics_so_far())
        except Exception as error:
            raise _unsaved(folder, error) from error
        self._prune()

    def _prune(self) -> None:
        scores = {step: validation_score(line) for step, line in read_metrics(self.log.folder).items()}
        known = {step: score for step, score in scores.items() if score is not None}
        retention.prune(self.config.trainer.default_local_dir, self._keep, known)

    def _metrics_so_far(self) -> dict[str, Any]:
        """The step's metrics with what verl adds to them after saving and validating."""
        metrics = dict(self._step_metrics)
        timing = {**self.timing_raw, "step": time.time() - self._step_started}
        epoch = (self.global_steps - 1) // self.steps_per_epoch
        self._compute_metrics(self._step_batch, metrics, timing, global_steps=self.global_steps, epoch=epoch)
        return metrics

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        progress.phase("preparation of the update")
        prompts = self.config.data.train_batch_size // self.parameter_sync_step
        expected = prompts * self.config.actor_rollout_ref.rollout.n
        metrics["rollout/missing_responses"] = expected - len(batch)
        if self.run.seeded_rollout:
            # Rollouts finish in any order; which minibatch a response falls into must not depend on it.
            order = problems_and_samples(batch)
            batch.reorder(sorted(range(len(batch)), key=order.__getitem__))
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        shorten_padding_rows(batch, self.token_columns)
        return batch

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The columns of a trajectory that are ours, with a row for each token."""
        return TOPK_COLUMNS if self.config.divergence.k else ()

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        extra_fields = column(batch, "extra_fields")
        real = [fields for fields, tag in zip(extra_fields, batch.tags, strict=True) if not is_padding(tag)]
        require_finite_rewards(real)
        metrics.update(outcome_metrics(real))
        if self.run.mask_std_0:
            skipped, metrics["groups/total"] = zero_variance_groups(batch, extra_fields)
            metrics["groups/zero_variance"] = len(skipped)
            if skipped:
                rows = [row for rows in skipped for row in rows]
                clear_loss_mask(batch, rows)
                self._spread(batch, rows)
        return batch

    def _spread(self, batch: KVBatchMeta, skipped: list[int]) -> None:
        """Of the rows that are left each rank gets as much work as the others (not where the actor shuffles)."""
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        minibatches = len(batch) // (actor.ppo_mini_batch_size * rollout.n)
        if ranks > 1 and not actor.shuffle and not self.run.train_all_rows:
            out = {*skipped, *(row for row, tag in enumerate(batch.tags) if is_padding(tag))}
            used = [row not in out for row in range(len(batch))]
            batch.reorder(spread(used, [tag["seq_len"] for tag in batch.tags], ranks, minibatches))

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if instantiate(self.config.method).needs_response_seeds:
            put_response_seeds(batch, self.run.seed, self.global_steps)
        dump, every = self.global_steps in self.run.dump_steps, self.run.inspect_every
        small = not dump and every > 0 and self.global_steps % every == 0
        if dump or small:
            put_inspection(batch, self.run.inspect_tokens if small else None)
        # A dump shows the skipped groups too.
        batch.extra_info[TRAIN_ALL_ROWS] = dump or self.run.train_all_rows
        batch.extra_info[DUMP_DIR] = f"{self.log.folder}/dumps/step_{self.global_steps}" if dump or small else ""
        # The weights that generate are those of the end of the last step.
        batch.extra_info[POLICY_VERSION] = self.global_steps - 1
        batch.extra_info[CONTINUES] = self.local_trigger_step > 0
        progress.phase("update")
        batch = super()._update_actor(batch, metrics)
        for name in [name for name in metrics if name.removeprefix("actor/").startswith(_OUR_FAMILIES)]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        require_finite_gradient(metrics, self.global_steps)
        return batch


class TrustRegionTrainer(TrustRegionTraining, PPOTrainerSync):
    """In lockstep: a batch is generated, then trained, by turns on the same devices."""


def _beside(start: Callable[..., Started], *arguments: Any) -> Future[Started]:
    """Run ``start`` while this process waits for something else."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(start, *arguments)
    executor.shutdown(wait=False)
    return future


def _prepare_server(config: DictConfig) -> None:
    """Import vLLM; on one machine without accelerators the first server's process is started, which does so as well.

    Where there are several, verl places a server on its workers' node, which is not known yet.
    """
    from cppo_verl.adapters.rollout.server import start_ahead

    if config.trainer.device == "cpu" and len(ray.nodes()) == 1:
        start_ahead(config.actor_rollout_ref.rollout.max_num_seqs)


def _unsaved(folder: Path, error: Exception) -> OSError:
    """The error of a checkpoint that could not be written, after what there was of it has been removed."""
    retention.remove(folder)
    steps = retention.complete_steps(folder.parent)
    last = (
        f"the last complete one is {retention.step_folder(folder.parent, steps[-1])}" if steps else "there is none yet"
    )
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    disk = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(disk).free / 2**30
    return OSError(
        f"the checkpoint {folder} could not be written and was removed ({reason.strip()}); {last}. The disk has "
        f"{free:.1f} GiB left. Make room (trainer.max_actor_ckpt_to_keep limits what a run keeps), then give the same "
        "command with run.resume=true"
    )
