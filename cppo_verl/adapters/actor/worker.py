"""The actor worker: verl's own, with the trust-region loss installed and its statistics returned with the metrics."""

from typing import Any

from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker

from cppo_verl.adapters import store
from cppo_verl.adapters.actor.engine import ExactTrainingWorker
from cppo_verl.adapters.actor.loss import TrustRegionLoss
from cppo_verl.adapters.actor.selection import select_rows
from cppo_verl.adapters.columns import CONTINUES, TRAIN_ALL_ROWS
from cppo_verl.run import progress


class TrustRegionTrainingWorker(ExactTrainingWorker):
    """Trains the minibatches of one update and adds the token statistics, summed over data parallelism."""

    loss_fn: TrustRegionLoss

    def train_mini_batch(self, data: TensorDict) -> TensorDict | None:
        if not tu.get_non_tensor_data(data, key=CONTINUES, default=False):
            self.loss_fn.begin_update()
        self._rows, self._trained, self._skipped = 0, 0, 0
        # verl's name for "show the loss function the logits too".
        tu.assign_non_tensor(data, distillation_use_topk=self.loss_fn.needs_logits)
        output = super().train_mini_batch(data)
        if output is not None:
            statistics = self.loss_fn.statistics.reduced(self.engine.get_data_parallel_group())
            update = {}
            if self._rows:  # 0 where all rows are trained on purpose
                update["update/trained_share"] = self._trained / self._rows
                update["update/skipped_minibatches"] = float(self._skipped)
            # verl takes it for granted; nothing was computed where every minibatch was skipped.
            metrics = {"mfu": 0.0, **tu.get(output, "metrics")}
            tu.assign_non_tensor(output, metrics={**metrics, **statistics.metrics(), **update})
        return output

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """One minibatch, of the rows that have a signal; without any the optimizer takes no step."""
        self.loss_fn.begin_minibatch()
        if not tu.get_non_tensor_data(data, key=TRAIN_ALL_ROWS, default=False):
            selected, trained, rows = select_rows(self._with_sizes(data), self.engine.get_data_parallel_group())
            self._trained, self._rows = self._trained + trained, self._rows + rows
            if selected is None:
                return self._skip(data)
            data = selected
        with progress.doing("update"):
            return super().train_batch(data)

    def _with_sizes(self, data: TensorDict) -> TensorDict:
        """With the sizes of micro-batches that verl would put in next, from the engine's settings."""
        engine = self.engine_config
        sizes = {
            "use_dynamic_bsz": engine.use_dynamic_bsz,
            "max_token_len_per_gpu": engine.max_token_len_per_gpu,
            "micro_batch_size_per_gpu": engine.micro_batch_size_per_gpu,
        }
        tu.assign_non_tensor(data, **{name: size for name, size in sizes.items() if name not in data})
        return data

    def _skip(self, data: TensorDict) -> TensorDict | None:
        """The outcome of a minibatch in which nothing was trained; the learning rate's schedule goes on."""
        self._skipped += 1
        metrics = {"loss": 0.0}
        if tu.get(data, key="update_lr_scheduler", default=False):
            metrics["lr"] = self.engine.lr_scheduler_step()
        if not self.engine.is_mp_src_rank_with_outputs():
            return None
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics})


class TrustRegionActorWorker(ActorRolloutRefWorker):
    """verl's hybrid worker (actor, rollout, optional reference) whose actor minimises :class:`TrustRegionLoss`."""

    actor_worker_cls = TrustRegionTrainingWorker
    ref_worker_cls = ExactTrainingWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from cppo_verl.adapters.rollout import sending  # vLLM's half, which the driver need not import for this class

        store.listen_on_its_host()
        sending.watch()
        super().__init__(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        progress.report(f"actor worker {self.rank}")
        super().init_model()
        if "actor" in self.role:
            self.actor.set_loss_fn(TrustRegionLoss(omega_conf_to_dataclass(self.config.actor)))
