"""What ``cppo train --dry-run`` says about a checked configuration beyond its values (docs/dry_run.md).

Imports neither verl nor Ray.
"""

import ast
import json
import math
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from cppo_verl.config import config_dir, verl_config_dir
from cppo_verl.memory import GIB, Estimate, Layout, Model, checkpoint_bytes, estimate, key_value_bytes, vllm_weights
from cppo_verl.validation import inspect_data_file

# Where there is no nvidia-smi: a card of 80 GB. Contexts, NCCL and fragmentation take a part that is not estimated.
_ASSUMED_CARD, _USABLE = 80 * GIB, 0.9
# verl's model_engine of each actor.strategy whose memory is estimated.
_ENGINES = {"fsdp": "dp", "fsdp2": "dp", "megatron": "megatron"}
_PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "vllm")
# Bytes from which on checkpoints that are never removed are worth a word.
_MANY_BYTES = 1e12
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def report(config: DictConfig) -> Iterator[str]:
    """The sections as lines, without comment signs."""
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
    found = [*unknown_fields(config, verl), *warnings(config, model, expected, card)]
    yield "warnings" if found else "warnings: none"
    yield from _indented(found)


def _indented(lines: Any) -> Iterator[str]:
    yield from (f"  {line}" for line in lines)


def find_model(settings: DictConfig) -> tuple[Model | None, str]:
    """(shape, where from) of a model folder, the local hub cache or configs/facts/; (None, why not)."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = settings.path
    if settings.lora_rank or settings.lora.get("rank"):
        return None, "LoRA trains other weights than the model's"
    owner, _, name = path.rpartition("/")
    facts = config_dir() / "facts" / f"{name.removesuffix('-Base')}.json"
    try:
        cached = None if Path(path).is_dir() else try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # a folder that is not on this machine
        cached = None
    for file in (Path(path) / "config.json", cached, facts if owner == "Qwen" else None):
        if isinstance(file, (str, Path)) and Path(file).is_file():
            shape = json.loads(Path(file).read_text())
            model = Model.from_config(shape)
            if model is None:
                return None, f"{path} (model_type {shape.get('model_type')}) is not one that is counted exactly"
            return (
                model,
                f"{model.parameters:,} parameters by {'configs/facts/' + facts.name if file == facts else file}",
            )
    return None, f"no config.json of {path} here (a model folder, the local hub cache, configs/facts/)"


def card_memory() -> tuple[float, str]:
    """(bytes, where from) of the smallest GPU that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return min(int(size) for size in listed) * 2.0**20, "card by nvidia-smi"
    except (OSError, subprocess.SubprocessError, ValueError):
        return _ASSUMED_CARD, f"a card of {_ASSUMED_CARD // GIB} GiB is assumed (no nvidia-smi here)"


def difference(config: DictConfig, verl: DictConfig) -> Iterator[str]:
    """Every leaf with another value than in verl's own composition, then those that only follow from others."""
    ours, theirs = dict(_leaves(config)), dict(_leaves(verl))
    following, shown = [], set()
    for key, (node, written, value) in ours.items():
        if key in theirs:
            _, their_reference, their_value = theirs[key]
            line = f"{key}: {_text(their_value)} -> {_text(value)}"
            if value != their_value and written == their_reference:
                following.append(line)
            elif value != their_value:
                yield line
        elif node not in shown:  # a node that refers to another one is one line
            shown.add(node)
            yield f"{node}: {_text(value if node == key else written)} (not a key of verl's)"
    for key, (_, _, value) in theirs.items():
        if key not in ours and not any(other.startswith(f"{key}.") for other in ours):
            yield f"{key}: {_text(value)} -> absent"
    if following:
        yield "these follow by verl's own references"
        yield from _indented(following)


def _leaves(config: DictConfig) -> Iterator[tuple[str, tuple[str, Any, Any]]]:
    """(key, (where it is written, as written, resolved)): below a reference to a node, that is the reference."""

    def walk(key: str, node: str, written: Any, value: Any) -> Iterator[tuple[str, tuple[str, Any, Any]]]:
        if not isinstance(value, dict) or not value:
            yield key, (node, written, value)
            return
        for name in value:
            below = f"{key}.{name}" if key else str(name)
            if isinstance(written, dict):
                yield from walk(below, below, written[name], value[name])
            else:
                yield from walk(below, node, written, value[name])

    yield from walk("", "", OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True))


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value and value.isprintable() else json.dumps(value)


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
        "GPUs": f"{layout.devices}, {layout.data_parallel} data-parallel ranks of {layout.split}",
        "responses of a minibatch per rank": f"{layout.responses}",
        "micro-batches of a minibatch per rank": _micro_batches(config, layout),
        "tokens of a micro-batch per GPU, at most": f"{layout.tokens:,}",
    }
    if config.divergence.k:
        size = config.divergence.k * (4 + (4 if config.divergence.log_prob_dtype == "float32" else 2))
        volume = responses * data.max_response_length * size
        result["Top-K queue per step, at most"] = f"{_size(volume)} ({size} bytes a response token)"
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
        result["checkpoint"] = f"{_size(one)} ({', '.join(actor.checkpoint.save_contents)})"
        result["disk for checkpoints"] = f"{_size(kept * one)} ({kept} kept of {saves} saved)"
    return result


def _micro_batches(config: DictConfig, layout: Layout) -> str:
    actor = config.actor_rollout_ref.actor
    if not actor.use_dynamic_bsz:
        return f"{math.ceil(layout.responses / actor.ppo_micro_batch_size_per_gpu)}"
    together = actor.ppo_max_token_len_per_gpu * layout.sequence // layout.longest
    return f"at most {math.ceil(layout.responses / max(together, 1))} (by tokens; all responses at full length)"


def _size(count: float) -> str:
    """Of a disk or a network: decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"


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
    yield "not counted: CUDA contexts and graphs, NCCL buffers, fragmentation"


def warnings(config: DictConfig, model: Model | None, expected: Estimate | None, card: float | None) -> Iterator[str]:
    """What will fail or cannot be meant, each with the setting and what to do."""
    yield from _about_batches(config)
    yield from _about_method(config)
    yield from _about_rollout(config, model)
    yield from _about_run(config, model)
    if model is not None and expected is not None:
        yield from _about_memory(config, model, expected, card)


def unknown_fields(config: DictConfig, verl: DictConfig) -> Iterator[str]:
    """Keys that Hydra composes and the workers fail on: the dataclass that verl makes of the node lacks the field."""
    nodes = [(f"actor_rollout_ref.{part}", config.actor_rollout_ref[part]) for part in ("actor", "rollout", "model")]
    while nodes:
        key, node = nodes.pop()
        children = {str(name): node._get_node(name) for name in node}
        nodes += [(f"{key}.{name}", child) for name, child in children.items() if isinstance(child, DictConfig)]
        path, _, kind = str(node.get("_target_")).rpartition(".")
        known = _fields(kind) if path.startswith("verl.") else None
        if known is not None:
            # verl's YAML has keys of its own that its code takes out first.
            for name in sorted(set(children) - known - set(OmegaConf.select(verl, key) or ())):
                yield f"{key}.{name}: verl's {kind} has no such field and the workers fail; leave it out"


@lru_cache(maxsize=1)
def _dataclasses() -> dict[str, tuple[list[str], set[str]]]:
    """(bases, own fields) of the classes in verl's config modules, read without importing verl."""
    root, found = verl_config_dir().parents[1], {}
    for file in (
        *root.glob("workers/config/*.py"),
        *root.glob("trainer/config/*.py"),
        root / "utils/profiler/config.py",
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
                names = {field.id for field in fields if isinstance(field, ast.Name)}
                found[node.name] = ([base.id for base in node.bases if isinstance(base, ast.Name)], names)
    return found


def _fields(name: str) -> set[str] | None:
    """Fields of a dataclass with those of its bases; None if it is not in the modules that are read."""
    if name not in _dataclasses():
        return None
    bases, names = _dataclasses()[name]
    return names.union(*(_fields(base) or set() for base in bases))


def _about_batches(config: DictConfig) -> Iterator[str]:
    actor, layout = config.actor_rollout_ref.actor, Layout.of(config)
    responses = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    minibatch = f"{_ACTOR}.ppo_mini_batch_size={actor.ppo_mini_batch_size}"
    if actor.use_dynamic_bsz and layout.longest > actor.ppo_max_token_len_per_gpu * layout.sequence:
        yield (
            f"{_ACTOR}.ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu}: the longest prompt and response, "
            f"{layout.longest} tokens, stop the run; give at least {math.ceil(layout.longest / layout.sequence)}"
        )
    if layout.devices % layout.split:
        yield (
            f"trainer.nnodes x trainer.n_gpus_per_node = {layout.devices} is not a multiple of the {layout.split} GPUs "
            "of tensor, pipeline, context and sequence parallelism; verl refuses it"
        )
    elif responses % layout.data_parallel:
        yield (
            f"{minibatch}: its {responses} responses cannot be divided over {layout.data_parallel} data-parallel "
            "ranks; verl refuses it"
        )
    elif layout.responses < 4 and layout.data_parallel > 1:
        yield (
            f"{minibatch} leaves {layout.responses} responses to a rank, and all ranks wait for the longest; use fewer "
            "GPUs or larger minibatches"
        )
    if updates_of(config) == 1:
        yield (
            f"{minibatch}: one update per iteration, at the rollout's own weights: every D_t is numerical noise and no "
            "trust region acts; give a smaller divisor of data.train_batch_size"
        )


def _about_method(config: DictConfig) -> Iterator[str]:
    method, divergence, actor = config.method, config.divergence, config.actor_rollout_ref.actor
    units = {"tv": "a total variation", "kl": "a KL divergence, in nats"}
    this, other = divergence.kind, "kl" if divergence.kind == "tv" else "tv"
    for name in ("delta", "delta_b", "delta_max", "delta_avg"):
        value, default = method.get(name), "dppo_delta" if (method.name, name) == ("dppo", "delta") else name
        if value is None:
            continue
        if this == "tv" and value >= 1:
            yield f"method.{name}={value}: a total variation is at most 1, so no token ever exceeds it; choose less"
        elif (this == "tv" and method.get("allow_tv")) or (
            value == config.thresholds[other].get(default) != config.thresholds[this].get(default)
        ):
            yield (
                f"method.{name}={value} is the threshold of {units[other]}, but {divergence.name} is {units[this]}; "
                "give one in that unit"
            )
    terms = {
        f"{_ACTOR}.use_kl_loss": actor.use_kl_loss,
        "algorithm.use_kl_in_reward": config.algorithm.use_kl_in_reward,
        f"{_ACTOR}.entropy_coeff": actor.entropy_coeff,
    }
    for name, value in terms.items():
        if value:
            cost = "" if "entropy" in name else ", and it adds a reference model's forward pass to every step"
            yield f"{name}={_text(value)}: the paper has no such term{cost}; leave it off to reproduce it"


def _about_rollout(config: DictConfig, model: Model | None) -> Iterator[str]:
    rollout, layout = config.actor_rollout_ref.rollout, Layout.of(config)
    tensor = rollout.tensor_model_parallel_size
    replica = tensor * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    key = f"{_ROLLOUT}.tensor_model_parallel_size={tensor}"
    if model is not None and model.heads % tensor:
        yield f"{key} does not divide the model's {model.heads} attention heads; vLLM refuses it"
    elif model is not None and max(model.key_value_heads, tensor) % min(model.key_value_heads, tensor):
        yield f"{key} and the model's {model.key_value_heads} key-value heads do not divide; vLLM refuses it"
    if layout.devices % replica:
        yield f"{key}: {layout.devices} GPUs are not a multiple of a replica's {replica}; verl refuses it"
    length = rollout.max_model_len or layout.longest
    if length < layout.longest:
        yield f"{_ROLLOUT}.max_model_len={length} cuts responses: prompt and response may have {layout.longest} tokens"
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < length:
        yield f"{_ROLLOUT}.max_num_batched_tokens: without chunked prefill vLLM wants at least {length}"
    val = rollout.val_kwargs
    if val.n == 1:
        yield f"{_ROLLOUT}.val_kwargs.n=1: one sample a problem says little; the paper takes 16"
    elif not val.do_sample or val.temperature == 0:
        yield f"{_ROLLOUT}.val_kwargs.n={val.n} without sampling gives one answer {val.n} times; set n=1"


def _about_run(config: DictConfig, model: Model | None) -> Iterator[str]:
    trainer, steps = config.trainer, steps_of(config)
    if trainer.total_training_steps is None:
        end = "" if steps is None else f" ({steps} steps)"
        yield f"trainer.total_training_steps=null: the run ends after {trainer.total_epochs} epochs{end}; give it"
    elif steps is not None and steps < trainer.total_training_steps:
        yield f"trainer.total_epochs={trainer.total_epochs} ends the run after {steps} steps; give more epochs"
    if trainer.save_freq <= 0:
        yield f"trainer.save_freq={trainer.save_freq}: nothing is saved to resume or evaluate; give a number of steps"
    if trainer.test_freq <= 0:
        yield f"trainer.test_freq={trainer.test_freq}: nothing is validated on the way; give a number of steps"
    if model is not None and trainer.max_actor_ckpt_to_keep is None:
        saves = saves_of(config, steps)
        size = saves * checkpoint_bytes(config, model)
        if size > _MANY_BYTES:
            yield (
                f"trainer.max_actor_ckpt_to_keep=null keeps all {saves} checkpoints, {_size(size)}; "
                "give a number or a larger trainer.save_freq"
            )


def _about_memory(config: DictConfig, model: Model, expected: Estimate, card: float | None) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    if card is None:
        bucket, needed = rollout.checkpoint_engine.update_weights_bucket_megabytes, math.ceil(model.head / 2**18)
        if needed > bucket:  # shared memory; on a GPU a larger tensor is sent by itself
            key = f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"
            yield f"{key}={bucket}: the embedding takes {needed} and is sent whole; give more"
        return
    sizes = {
        name: f"an estimated {getattr(expected, name).total / GIB:.0f} GiB of {card / GIB:.0f}"
        for name in vars(expected)
    }
    if expected.update.total > _USABLE * card:
        recompute = f"{_ACTOR}.megatron.override_transformer_config.recompute_granularity=full"
        if config.actor_rollout_ref.actor.strategy != "megatron":
            recompute = "actor_rollout_ref.model.enable_gradient_checkpointing=true"
        yield f"the update takes {sizes['update']}: fewer tokens a micro-batch, more parallelism, or {recompute}"
    share = f"{_ROLLOUT}.gpu_memory_utilization={rollout.gpu_memory_utilization}"
    kept = expected.rollout.total - expected.rollout.vllm
    if expected.rollout.total > _USABLE * card:
        yield (
            f"{share}: generation takes {sizes['rollout']} with what the trainer keeps; give at most "
            f"{max(math.floor(100 * (_USABLE - kept / card)), 0) / 100}, or param_offload and optimizer_offload"
        )
    if expected.sync.total > _USABLE * card:
        yield f"sending the weights to vLLM takes {sizes['sync']}: param_offload and optimizer_offload"
    room = rollout.gpu_memory_utilization * card - vllm_weights(config, model)
    if room < Layout.of(config).longest * key_value_bytes(config, model):
        yield f"{share} leaves no room for one response beside the weights; give more, or tensor_model_parallel_size"
