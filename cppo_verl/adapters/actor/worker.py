"""The actor worker: verl's own, with the trust-region loss installed and its statistics returned with the metrics."""

from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from cppo_verl.adapters.actor.loss import TrustRegionLoss


class TrustRegionTrainingWorker(TrainingWorker):
    """Trains the minibatches of one update and adds the token statistics, summed over data parallelism."""

    loss_fn: TrustRegionLoss

    def train_mini_batch(self, data: TensorDict) -> TensorDict | None:
        self.loss_fn.begin_update()
        # verl's name for "show the loss function the logits too".
        tu.assign_non_tensor(data, distillation_use_topk=self.loss_fn.needs_logits)
        output = super().train_mini_batch(data)
        if output is not None:
            statistics = self.loss_fn.statistics
            statistics.reduce(self.engine.get_data_parallel_group())
            tu.assign_non_tensor(output, metrics={**tu.get(output, "metrics"), **statistics.metrics()})
        return output

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        self.loss_fn.begin_minibatch()
        return super().train_batch(data)


class TrustRegionActorWorker(ActorRolloutRefWorker):
    """verl's hybrid worker (actor, rollout, optional reference) whose actor minimises :class:`TrustRegionLoss`."""

    actor_worker_cls = TrustRegionTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        super().init_model()
        if "actor" in self.role:
            self.actor.set_loss_fn(TrustRegionLoss(omega_conf_to_dataclass(self.config.actor)))
