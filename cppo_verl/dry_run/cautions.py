"""What will fail or cannot be meant, each with the setting and what to do."""

import ast
import math
from collections.abc import Iterator
from functools import lru_cache

from omegaconf import DictConfig, OmegaConf

from cppo_verl.config.compose import verl_config_dir
from cppo_verl.dry_run.derived import saves_of, size_text, steps_of, updates_of
from cppo_verl.dry_run.difference import text_of
from cppo_verl.dry_run.memory import GIB, Estimate, Layout, Parts, checkpoint_bytes, key_value_bytes, vllm_weights
from cppo_verl.dry_run.model import Model

# Of a card: contexts, NCCL and fragmentation take a part that is not estimated.
_USABLE = 0.9
# Bytes from which on checkpoints that are never removed are worth a word.
_MANY_BYTES = 1e12
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def cautions(config: DictConfig, model: Model | None, expected: Estimate | None, card: float | None) -> Iterator[str]:
    """What will fail or cannot be meant, each with the setting and what to do."""
    yield from _about_batches(config)
    yield from _about_method(config)
    yield from _about_mode(config)
    yield from _about_rollout(config, model)
    if model is not None and config.actor_rollout_ref.actor.strategy == "megatron":
        yield from _about_megatron(config, model)
    yield from _about_run(config, model)
    if model is not None and expected is not None:
        yield from _about_memory(config, model, expected, card)


def _about_mode(config: DictConfig) -> Iterator[str]:
    mode = config.trainer.v1.trainer_mode
    if mode != "sync" and config.run.seeded_rollout:
        yield (
            f"run.seeded_rollout=true: with mode={mode} no two runs are the same, nor is a resumed one, whatever the "
            "seeds: when a response is interrupted depends on time (docs/async.md); mode=sync is repeatable"
        )


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
    minibatch = f"{_ACTOR}.ppo_mini_batch_size={actor.ppo_mini_batch_size}"
    if actor.use_dynamic_bsz and layout.longest > actor.ppo_max_token_len_per_gpu * layout.sequence:
        yield (
            f"{_ACTOR}.ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu}: the longest prompt and response, "
            f"{layout.longest} tokens, stop the run; give at least {math.ceil(layout.longest / layout.sequence)}"
        )
    if layout.responses < 4 and layout.data_parallel > 1:
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
        if this == "tv" and value >= 1 and method.name != "drpo":  # which attenuates below its delta
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
            yield f"{name}={text_of(value)}: the paper has no such term{cost}; leave it off to reproduce it"


def _about_rollout(config: DictConfig, model: Model | None) -> Iterator[str]:
    rollout, layout = config.actor_rollout_ref.rollout, Layout.of(config)
    tensor = rollout.tensor_model_parallel_size
    key = f"{_ROLLOUT}.tensor_model_parallel_size={tensor}"
    if model is not None and model.heads % tensor:
        yield f"{key} does not divide the model's {model.heads} attention heads; vLLM refuses it"
    elif model is not None and max(model.key_value_heads, tensor) % min(model.key_value_heads, tensor):
        yield f"{key} and the model's {model.key_value_heads} key-value heads do not divide; vLLM refuses it"
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


def _about_megatron(config: DictConfig, model: Model) -> Iterator[str]:
    megatron = config.actor_rollout_ref.actor.megatron
    tensor, experts = megatron.tensor_model_parallel_size, megatron.expert_model_parallel_size
    if model.heads % tensor:
        key = f"{_ACTOR}.megatron.tensor_model_parallel_size={tensor}"
        yield f"{key} does not divide the model's {model.heads} attention heads; Megatron refuses it"
    key = f"{_ACTOR}.megatron.expert_model_parallel_size={experts}"
    if experts > 1 and not model.experts:
        yield f"{key}: the model has no experts; leave it at 1"
    elif model.experts % experts:
        yield f"{key} does not divide the model's {model.experts} experts; Megatron refuses it"


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
                f"trainer.max_actor_ckpt_to_keep=null keeps all {saves} checkpoints, {size_text(size)}; "
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
        yield f"the update takes {sizes['update']}: {_for_update(config, expected.update, _USABLE * card)}"
    engine = config.actor_rollout_ref.actor
    engine = engine.megatron if engine.strategy == "megatron" else engine.fsdp_config
    offload = (
        "more GPUs" if engine.param_offload and engine.optimizer_offload else "param_offload and optimizer_offload"
    )
    share = f"{_ROLLOUT}.gpu_memory_utilization={rollout.gpu_memory_utilization}"
    kept = expected.rollout.total - expected.rollout.vllm
    if expected.rollout.total > _USABLE * card:
        yield (
            f"{share}: generation takes {sizes['rollout']} with what the trainer keeps; give at most "
            f"{max(math.floor(100 * (_USABLE - kept / card)), 0) / 100}, or {offload}"
        )
    if expected.sync.total > _USABLE * card:
        yield f"sending the weights to vLLM takes {sizes['sync']}: {offload}"
    room = rollout.gpu_memory_utilization * card - vllm_weights(config, model)
    if room < Layout.of(config).longest * key_value_bytes(config, model):
        yield f"{share} leaves no room for one response beside the weights; give more, or tensor_model_parallel_size"


def _for_update(config: DictConfig, update: Parts, room: float) -> str:
    """What would help and is not in force."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if update.weights + update.gradients + update.optimizer + update.vllm > room:
        return "weights, gradients and optimizer alone are too large; more GPUs"
    if actor.strategy == "megatron":
        granularity = f"{_ACTOR}.megatron.override_transformer_config.recompute_granularity"
        recompute = "" if OmegaConf.select(config, granularity) == "full" else f", or {granularity}=full"
    else:
        recompute = (
            ""
            if model.enable_gradient_checkpointing
            else (", or actor_rollout_ref.model.enable_gradient_checkpointing=true")
        )
    return f"fewer tokens a micro-batch, more GPUs{recompute}"
