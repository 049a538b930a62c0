"""Ours in every process of vLLM (``vllm.general_plugins`` entry point: called before a model is built)."""

import multiprocessing
import os
from typing import Any

from cppo_verl.adapters import store
from cppo_verl.run import progress

# vLLM's: how its processes start others.
_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def register() -> None:
    """Have the process write its stacks when it is asked to, and the store listen on its host; on CPUs keep Linear
    weights, and those of experts, updatable.

    vLLM's CPU backend repacks them after loading and drops the parameter, so the first weight sync of a training run
    would fail; a plain ``F.linear`` on the kept parameter serves both. For experts it does so, and pads them, where
    the processor has AVX-512 (with AMX it would refuse float32); its own plain loop over experts serves.
    """
    progress.report()
    store.listen_on_its_host()
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    if multiprocessing.parent_process() is not None and os.environ.get(_METHOD) == "spawn":
        # vLLM itself forks its workers, but where its server is a Ray actor, which cannot be forked, all that the
        # server starts is told to spawn; the engine is none, and its worker need not import everything again.
        os.environ[_METHOD] = "fork"
        progress.report_in_forks()
    import torch
    import vllm.model_executor.layers.utils as layers
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

    def keep_parameter(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep_parameter
    CPUFusedMOE._pad_moe_intermediate_for_grouped_gemm = lambda self, layer: None
    CPUFusedMOE.check_grouped_gemm = lambda self, layer: (False, "none")
