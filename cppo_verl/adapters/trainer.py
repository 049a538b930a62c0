"""verl's synchronous V1 trainer with what CPPO needs: our worker, mask_std_0, per-response seeds, the run's log."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from hydra.utils import instantiate
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import tensordict_utils as tu
from verl.utils.tracking import Tracking

from cppo_verl import retention
from cppo_verl.adapters.actor import TrustRegionActorWorker
from cppo_verl.adapters.agent_loop import TRUNCATED
from cppo_verl.adapters.seeding import problem_key, response_seed
from cppo_verl.adapters.topk import IDS, LOG_PROBS
from cppo_verl.data.sources import AIME
from cppo_verl.grading import OUTCOMES
from cppo_verl.run_log import RunLog, accuracies, read_metrics, validation_score

# Families of metrics that our actor returns; verl prefixes everything an actor returns with "actor/".
_OUR_FAMILIES = ("trust_region/", "divergence/", "rollout/", "policy/")


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


class TrustRegionTrainer(PPOTrainerSync):
    """One instance drives a run. Everything not overridden here is verl's."""

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

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.run.poll_interval
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(TrustRegionActorWorker)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._restore_history(self.global_steps)
        self.log.event("initialized", step=self.global_steps, total_steps=self.total_training_steps)

    def _restore_history(self, step: int) -> None:
        """Metrics and validation samples as they were at ``step``; its validation is repeated if it had not ended."""
        for path in (self.log.folder / "validation").glob("*.jsonl"):
            if int(path.stem) > step:
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
        saved = retention.metrics_of(folder) if retention.is_complete(folder) else {}
        due = settings.test_freq > 0 and (step % settings.test_freq == 0 or step >= self.total_training_steps)
        settings.val_before_train = due and not accuracies(logged)
        if settings.val_before_train:
            self.log.forget_after(step - 1)
            self._unfinished = {**saved, **logged}
        else:
            self.log.forget_after(step)
            if not logged:
                self._unlogged = step, saved

    def on_validate_begin(self) -> None:
        self.log.event("validating", step=self.global_steps)

    def on_sample_begin(self) -> None:
        super().on_sample_begin()
        self.log.event("generating", step=self.global_steps)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        # Read by our agent loop. Validation batches do not pass here: they ask for no Top-K log-probabilities.
        tu.assign_non_tensor_data(batch, "divergence_k", self.config.divergence.k)
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
            columns["data_source"] = [str(source[key.rsplit("_", 2)[0]]) for key in columns["uid"]]
            super()._dump_generations(**samples)
        metrics = super()._val_metrics_update(data_sources, sample_uids, *args, **kwargs)
        # verl counts a response that could not be generated or graded as wrong; here it is reported as well.
        expected = sum((kwargs.get("expected_acc_counts") or {}).values())
        return metrics | aime_mean(metrics) | {"validation/missing_responses": max(expected - len(sample_uids), 0)}

    def _save_checkpoint(self) -> None:
        self.log.event("saving", step=self.global_steps)
        self._prune()  # room for the new one
        folder = retention.step_folder(self.config.trainer.default_local_dir, self.global_steps)
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
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        metrics["rollout/missing_responses"] = expected - len(batch)
        if self.run.seeded_rollout:
            # Rollouts finish in any order; which minibatch a response falls into must not depend on it.
            problems = _problems(batch)
            samples = [_sample_number(key) for key in batch.keys]
            batch.reorder(sorted(range(len(batch)), key=lambda row: (problems[row], samples[row])))
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        if self.config.divergence.k:
            _shorten_padding_rows(batch)
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        extra_fields = _column(batch, "extra_fields")
        real = [
            fields for fields, tag in zip(extra_fields, batch.tags, strict=True) if not tag.get("is_padding", False)
        ]
        _require_finite_rewards(real)
        metrics.update(outcome_metrics(real))
        if self.run.mask_std_0:
            skipped, groups = _zero_variance_rows(batch, extra_fields)
            metrics["groups/total"] = groups
            metrics["groups/zero_variance"] = len({batch.keys[row].rsplit("_", 2)[0] for row in skipped})
            if skipped:
                _clear_loss_mask(batch, skipped)
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if instantiate(self.config.method).needs_response_seeds:
            _put_response_seeds(batch, self.run.seed, self.global_steps)
        dump = self.global_steps in self.run.dump_steps
        batch.extra_info["dump_dir"] = f"{self.log.folder}/dumps/step_{self.global_steps}" if dump else ""
        batch = super()._update_actor(batch, metrics)
        for name in [name for name in metrics if name.removeprefix("actor/").startswith(_OUR_FAMILIES)]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        self._require_finite_gradient(metrics)
        return batch

    def _require_finite_gradient(self, metrics: dict) -> None:
        """On FSDP verl prints a non-finite gradient norm, skips the update and goes on; a run must not, unnoticed."""
        norm = metrics.get("actor/grad_norm")
        if norm is not None and not np.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of step {self.global_steps} is {norm}: training stopped. "
                "The last checkpoint is intact; a lower learning rate or run.dump_steps may show why."
            )


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


def _column(batch: KVBatchMeta, field: str) -> list[Any]:
    """A per-row field that is not a tensor, in row order."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[field])
    return [getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value for value in data[field]]


def _problems(batch: KVBatchMeta) -> list[str]:
    return [problem_key(raw_prompt) for raw_prompt in _column(batch, "raw_prompt")]


def _sample_number(key: str) -> int:
    """The number of a response within its group, from TransferQueue's key ``{uid}_{sample}_{output}``."""
    return int(key.rsplit("_", 2)[1])


def outcome_metrics(extra_fields: list[dict[str, Any]]) -> dict[str, float]:
    """How many responses of a step had each outcome, and the shares that were cut off or gave no answer.

    Outcomes are the ``grade_*`` flags of :func:`cppo_verl.grading.compute_score`; other reward functions may lack them.
    """
    metrics = {}
    verdicts = [fields.get("reward_extra_info", {}) for fields in extra_fields]
    flags = [name for name in OUTCOMES if name != "right"]
    if verdicts and all(f"grade_{name}" in verdict for verdict in verdicts for name in flags):
        counts = {name: sum(verdict[f"grade_{name}"] > 0 for verdict in verdicts) for name in flags}
        metrics = {f"grading/{name}": counts[name] for name in flags}
        metrics["grading/right"] = len(verdicts) - sum(counts.values())
        metrics["grading/no_answer_rate"] = counts["no_answer"] / len(verdicts)
    truncated = [fields[TRUNCATED] for fields in extra_fields if TRUNCATED in fields]
    if truncated:
        metrics["rollout/truncation_rate"] = sum(truncated) / len(truncated)
    return metrics


def aime_mean(metrics: Mapping[str, float]) -> dict[str, float]:
    """The unweighted mean of AIME24, AIME25 and AIME26 where a validation has all three, named as verl names theirs."""
    scores = {}
    for name in metrics:
        if name.startswith(f"val-core/{AIME[0]}/acc/mean@"):
            names = [name.replace(AIME[0], benchmark, 1) for benchmark in AIME]
            if all(other in metrics for other in names):
                scores[name.replace(AIME[0], "aime_mean", 1)] = float(np.mean([metrics[other] for other in names]))
    return scores


def _zero_variance_rows(batch: KVBatchMeta, extra_fields: list[dict[str, Any]]) -> tuple[list[int], int]:
    """Rows of groups in which every response has the same ``acc`` (padding rows left out), and the number of groups."""
    accuracy = [_accuracy(extra) for extra in extra_fields]
    groups: dict[str, list[int]] = {}
    for row, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
        if not tag.get("is_padding", False):
            groups.setdefault(key.rsplit("_", 2)[0], []).append(row)
    constant = [rows for rows in groups.values() if len({accuracy[row] for row in rows}) == 1]
    return [row for rows in constant for row in rows], len(groups)


def _accuracy(extra_fields: dict[str, Any]) -> float:
    """The verdict of a response: shaping may change its score, not whether a group carries a signal."""
    verdict = extra_fields.get("reward_extra_info", {})
    if "acc" not in verdict:
        raise ValueError(f"the reward function must return a dict with score and acc (1 right, 0 wrong); got {verdict}")
    return float(verdict["acc"])


def _require_finite_rewards(extra_fields: list[dict[str, Any]]) -> None:
    """A NaN in one response spreads over its group, or hides in one that mask_std_0 leaves out."""
    for fields in extra_fields:
        verdict = fields.get("reward_extra_info", {})
        wrong = [name for name in ("score", "acc") if not np.isfinite(verdict.get(name, 0.0))]
        if wrong:
            raise ValueError(
                f"the reward function returned {wrong[0]} = {verdict[wrong[0]]} for a response: training stopped. The "
                "last checkpoint is intact; mend the reward, then continue with run.resume=true"
            )


def _clear_loss_mask(batch: KVBatchMeta, rows: list[int]) -> None:
    """Take rows out of the loss and of the token metrics; ``response_mask`` stays, verl's length metrics read it."""
    keys = [batch.keys[row] for row in rows]
    mask = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["loss_mask"])["loss_mask"]
    cleared = torch.nested.as_nested_tensor([torch.zeros_like(row) for row in mask.unbind()], layout=torch.jagged)
    fields = TensorDict({"loss_mask": cleared}, batch_size=len(keys))
    tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields)


def _shorten_padding_rows(batch: KVBatchMeta) -> None:
    """verl fills a batch up with one-token copies of its first response, but copies fields it does not know whole."""
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("is_padding", False)]
    if not keys:
        return
    stored = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=[IDS, LOG_PROBS])
    shortened = {name: torch.stack([row[:1] for row in stored[name].unbind()]) for name in (IDS, LOG_PROBS)}
    tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=TensorDict(shortened, batch_size=len(keys)))


def _put_response_seeds(batch: KVBatchMeta, run_seed: int, step: int) -> None:
    """One seed per response, so that shuffled weights depend on neither micro-batch nor order."""
    seeds = [
        response_seed(run_seed, step, problem, _sample_number(key))
        for problem, key in zip(_problems(batch), batch.keys, strict=True)
    ]
    fields = TensorDict({"response_seeds": torch.tensor(seeds).unsqueeze(-1)}, batch_size=len(seeds))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    if batch.fields is not None:  # what the workers will fetch; None would mean everything
        batch.fields = [*batch.fields, "response_seeds"]
