"""What ``cppo train --dry-run`` says about a checked configuration beyond its values (docs/dry_run.md).

Imports neither verl nor Ray.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from cppo_verl.config.compose import verl_config_dir
from cppo_verl.dry_run.cautions import cautions, unknown_fields
from cppo_verl.dry_run.derived import derived, queue_bytes, size_text
from cppo_verl.dry_run.difference import difference
from cppo_verl.dry_run.memory import (
    GIB,
    Estimate,
    Layout,
    Parts,
    estimate,
    host_bytes,
    key_value_bytes,
    vllm_weights,
)
from cppo_verl.dry_run.model import Model, find_model

# Where there is no nvidia-smi: a card of 80 GB.
_ASSUMED_CARD = 80 * GIB
# verl's model_engine of each actor.strategy whose memory is estimated.
_ENGINES = {"fsdp": "dp", "fsdp2": "dp", "megatron": "megatron"}
_PARTS = tuple(field.name for field in fields(Parts))


def describe(config: DictConfig) -> tuple[list[str], list[str]]:
    """(the sections as lines, the warnings among them)."""
    found: list[str] = []
    return list(_sections(config, found)), found


def _sections(config: DictConfig, found: list[str]) -> Iterator[str]:
    strategy = config.actor_rollout_ref.actor.strategy
    engine = _ENGINES.get(strategy, strategy)
    with initialize_config_dir(str(verl_config_dir()), version_base=None):
        verl = compose("ppo_trainer", overrides=[f"model_engine={engine}"])
    yield f"difference from verl's defaults (ppo_trainer, model_engine={engine})"
    yield from _indented(difference(config, verl))
    if strategy not in _ENGINES:
        yield f"derived quantities, memory and warnings: only for {', '.join(_ENGINES)}"
        return
    model, source = find_model(config.actor_rollout_ref.model)
    card, card_source = (None, "CPU") if config.trainer.device == "cpu" else card_memory()
    expected = None if model is None else estimate(config, model, card)
    yield "derived quantities"
    yield from _indented(f"{name}: {text}" for name, text in derived(config, model).items())
    if model is None or expected is None:
        yield f"memory per GPU: not estimated: {source}"
    else:
        yield f"memory per GPU, estimated: {card_source}; {source}"
        yield from _indented(_table(expected))
        yield from _indented(_cache(config, model, card))
        yield "host memory per node, at least"
        yield from _indented(_host(config, model))
    found += [*unknown_fields(config, verl), *cautions(config, model, expected, card)]
    yield (
        "warnings"
        if found
        else "warnings: none; only settings were looked at (what was ever run: docs/reproduction.md)"
    )
    yield from _indented(found)


def _indented(lines: Any) -> Iterator[str]:
    yield from (f"  {line}" for line in lines)


def card_memory() -> tuple[float, str]:
    """(bytes, where from) of the smallest GPU that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return min(int(size) for size in listed) * 2.0**20, "card by nvidia-smi"
    except (OSError, subprocess.SubprocessError, ValueError):
        return _ASSUMED_CARD, f"a card of {_ASSUMED_CARD // GIB} GiB is assumed (no nvidia-smi here)"


def _cache(config: DictConfig, model: Model, card: float | None) -> Iterator[str]:
    if card is None:
        yield "not counted: vLLM's cache (VLLM_CPU_KVCACHE_SPACE)"
    else:
        room = config.actor_rollout_ref.rollout.gpu_memory_utilization * card - vllm_weights(config, model)
        tokens = max(room, 0) / key_value_bytes(config, model)
        full = int(tokens / Layout.of(config).longest)
        yield f"vLLM's cache, at most: {int(tokens):,} tokens a replica, {full} responses at full length"


def _table(expected: Estimate) -> Iterator[str]:
    moments = {"update": expected.update, "weight sync": expected.sync, "generation": expected.rollout}
    unit, size = ("GiB", GIB) if expected.update.total > GIB else ("MiB", 2**20)
    yield f"{unit:<14}" + "".join(f"{name:>13}" for name in moments)
    for part in (*_PARTS, "total"):
        yield f"{part:<14}" + "".join(f"{getattr(moment, part) / size:>13.2f}" for moment in moments.values())
    yield "update: a training step; weight sync: sending the new weights to vLLM; generation: vLLM's turn"
    yield "gathered: tensors put together from all GPUs for a moment; activations, logits: of one micro-batch"
    yield "step: what the optimizer takes for a moment, on GPUs; vllm: its weights and cache, none while it sleeps"
    yield "not counted: CUDA contexts and graphs, NCCL buffers, fragmentation"


def _host(config: DictConfig, model: Model) -> Iterator[str]:
    yield f"offloaded weights and optimizer: {host_bytes(config, model) / GIB:.1f} GiB"
    if config.divergence.k:
        yield f"Top-K queue: up to {size_text(queue_bytes(config))} a step, on all nodes together"
    yield "not counted: the processes themselves, Ray's object store, loading the model and the reference policy"
