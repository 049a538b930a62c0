"""Quantities that follow from a configuration: steps, tokens, ranks, bytes."""

import math
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from cppo_verl.config.check_files import inspect_data_file
from cppo_verl.dry_run.memory import Layout, checkpoint_bytes
from cppo_verl.dry_run.model import Model


def _rows(config: DictConfig, key: str) -> int | None:
    """Problems in the data files of ``key``; None where they are absent or only verl's loader can tell."""
    files = config.data[key] if isinstance(config.data[key], ListConfig) else [config.data[key]]
    looked = [inspect_data_file(Path(file), config.data.prompt_key) for file in files if "://" not in str(file)]
    told = len(looked) == len(files) and all(problem is None and count < 1 << 60 for problem, count in looked)
    return sum(count for _, count in looked) if told else None


def steps_of(config: DictConfig) -> int | None:
    """Steps the run will take: total_training_steps, but not more than total_epochs give."""
    rows, steps = _rows(config, "train_files"), config.trainer.total_training_steps
    in_epochs = None if rows is None else rows // config.data.train_batch_size * config.trainer.total_epochs
    return min((number for number in (steps, in_epochs) if number is not None), default=None)


def updates_of(config: DictConfig) -> int:
    actor = config.actor_rollout_ref.actor
    return config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs


def saves_of(config: DictConfig, steps: int | None) -> int:
    """Checkpoints a run writes: every save_freq steps, and the last one."""
    freq = config.trainer.save_freq
    return math.ceil(steps / freq) if steps and freq > 0 else 0


def derived(config: DictConfig, model: Model | None) -> dict[str, str]:
    """Quantities that follow from the settings, name to text."""
    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    layout, steps, updates = Layout.of(config), steps_of(config), updates_of(config)
    responses, rows = data.train_batch_size * rollout.n, _rows(config, "train_files")
    result = {
        "responses per step": f"{responses:,} ({data.train_batch_size} prompts x {rollout.n})",
        "updates per iteration": f"{updates} (minibatches of {actor.ppo_mini_batch_size} prompts)",
        "steps of the run": "not known (total_training_steps is null)" if steps is None else f"{steps:,}",
        "optimizer steps of the run": "not known" if steps is None else f"{steps * updates:,}",
        "tokens per step, at most": f"{responses * layout.longest:,} ({responses:,} x {layout.longest:,})",
        "GPUs": _devices(config, layout),
        "responses of a minibatch per rank": f"{layout.responses}",
        "micro-batches of a minibatch per rank": _micro_batches(config, layout),
        "tokens of a micro-batch per GPU, at most": f"{layout.tokens:,}",
    }
    if config.divergence.k:
        each = queue_bytes(config) // (responses * data.max_response_length)
        result["Top-K queue per step, at most"] = f"{size_text(queue_bytes(config))} ({each} bytes a response token)"
    if rows is not None and steps is not None:
        result["epochs over the data"] = f"{steps * data.train_batch_size / rows:.2f} ({rows:,} problems)"
    problems = _rows(config, "val_files")
    if problems is not None:
        samples = problems * rollout.val_kwargs.n
        result["samples per validation"] = f"{samples:,} ({problems:,} problems x {rollout.val_kwargs.n})"
    if model is not None:
        one, saves = checkpoint_bytes(config, model), saves_of(config, steps)
        newest = config.trainer.max_actor_ckpt_to_keep
        kept = saves if newest is None else min(saves, newest + 1)  # and the best one
        result["checkpoint"] = f"{size_text(one)} ({', '.join(actor.checkpoint.save_contents)})"
        result["disk for checkpoints"] = f"{size_text(kept * one)} ({kept} kept of {saves} saved)"
    return result


def _devices(config: DictConfig, layout: Layout) -> str:
    nodes, of_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    ranks = f"{layout.data_parallel} data-parallel rank{'s' * (layout.data_parallel > 1)}"
    each = "" if layout.split == 1 else f", each of {layout.split} GPUs that work on the same responses"
    return f"{layout.devices} ({nodes} node{'s' * (nodes > 1)} x {of_node}; {ranks}{each})"


def queue_bytes(config: DictConfig) -> int:
    """Of a step's Top-K log-probabilities on their way from vLLM to the loss, all responses at full length."""
    size = config.divergence.k * (4 + (4 if config.divergence.log_prob_dtype == "float32" else 2))
    return config.data.train_batch_size * config.actor_rollout_ref.rollout.n * config.data.max_response_length * size


def _micro_batches(config: DictConfig, layout: Layout) -> str:
    actor = config.actor_rollout_ref.actor
    if not actor.use_dynamic_bsz:
        return f"{math.ceil(layout.responses / actor.ppo_micro_batch_size_per_gpu)}"
    together = actor.ppo_max_token_len_per_gpu * layout.sequence // layout.longest
    return f"at most {math.ceil(layout.responses / max(together, 1))} (by tokens; all responses at full length)"


def size_text(count: float) -> str:
    """Of a disk or a network: decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"
