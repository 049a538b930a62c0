"""verl's FSDP engines with log pi, temperature and entropy in float32, for the actor and the reference policy.

verl computes them in the logits' dtype where flash-attn's kernel is missing, and divides by the temperature in it
everywhere: with bfloat16 logits log pi is off by 0.01 and more (docs/topk.md has what each path computes in).
"""

import os
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker

from cppo_verl.adapters.actor.log_prob import token_log_probs

_MODEL_TYPE = "exact_language_model"
_BACKENDS = ["fsdp", "fsdp2"]


@EngineRegistry.register(model_type=_MODEL_TYPE, backend=_BACKENDS, device=["cuda", "npu"])
class ExactFSDPEngine(FSDPEngineWithLMHead):
    """verl's engine, but for what it makes of the logits."""

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:
        model_config.model_type = "language_model"  # what verl tells it from a critic by
        super().__init__(model_config, *args, **kwargs)

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """verl's signature. Log-probabilities, and where asked for entropies, float32, nested ``[B, tokens]``.

        verl's own method lays out the logits, row by row of the sequences it was given, for its logits hook; everything
        else is done there.
        """

        def asked(name: str) -> bool:
            return bool(tu.get_non_tensor_data(micro_batch, key=name, default=False))

        entropy, unscaled = asked("calculate_entropy"), output_args["temperature_is_one"]
        if asked("use_fused_kernels") or (flash_kernel() and unscaled and not entropy):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)

        def hook(student_logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
            temperature = None if unscaled else _row_temperatures(output_args, micro_batch)
            if asked("distillation_use_topk"):
                logits_processor_func(student_logits=student_logits, data=micro_batch, temperature=temperature)
            labels = output_args["input_ids_rmpad_rolled"]
            values = token_log_probs(student_logits[0], labels, temperature, entropy, inplace_backward=True)
            names = ("log_probs", "entropy") if entropy else ("log_probs",)
            return {name: value.unsqueeze(0) for name, value in zip(names, values, strict=False) if value is not None}

        asking = micro_batch.copy()
        tu.assign_non_tensor(asking, distillation_use_topk=True, distillation_only=True, calculate_entropy=False)
        return super().prepare_model_outputs(output, {**output_args, "temperature_is_one": True}, asking, hook)


class ExactTrainingWorker(TrainingWorker):
    """verl's training worker on :class:`ExactFSDPEngine`, or on verl's own Megatron engine, exact by itself."""

    def __init__(self, config: TrainingWorkerConfig) -> None:
        if config.engine_config.strategy in _BACKENDS:
            config = replace(config, model_type=_MODEL_TYPE)
        super().__init__(config)


def flash_kernel() -> bool:
    """Whether verl's log-probabilities come from flash-attn's cross-entropy, which widens each logit to float32."""
    there = torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE
    return there and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def _row_temperatures(output_args: dict[str, Any], micro_batch: TensorDict) -> Tensor:
    """The temperature of each row of this rank's logits, as verl clamps it."""
    temperature = output_args.get("temperature_rmpad")
    if temperature is None:  # one a sequence, where nothing was packed
        temperature = output_args["temperature"].repeat_interleave(micro_batch["input_ids"].offsets().diff())
    return torch.clamp(temperature, min=1e-8)
