"""The actor worker of ``run.staleness``: it keeps the weights of some steps ago beside those that it trains."""

import torch
from torch.utils._pytree import tree_map_only
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name

from cppo_verl.adapters.actor.worker import TrustRegionActorWorker


class StaleActorWorker(TrustRegionActorWorker, DetachActorWorker):
    """Ours, with verl's copies of the weights in the memory of the machine."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_model_to_cpu(self, n: int) -> None:
        super().save_model_to_cpu(n)
        if get_device_name() == "cpu":
            # Moving to where they are copies nothing, and the next update would change what was saved.
            self.cpu_saved_models[n] = tree_map_only(torch.Tensor, torch.Tensor.clone, self.cpu_saved_models[n])
