"""What a setting may be: type, range and unit, one row each; checked before anything is computed from it.

Rows are for settings that a person is likely to give. What several settings must be together, and what a method's own
fields must be (its class checks them), is in the other modules of this room. A row whose setting a platform or an
engine does not have, or whose value is another setting's, is passed over.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from cppo_verl.problems import Problem, about

_LARGEST_SEED = 2**32 - 1  # numpy's
_LONGEST_SHOWN = 80  # characters of a value


class Rule(NamedTuple):
    """What a value must be."""

    wanted: str
    """After "give ", with the unit."""
    accepts: Callable[[Any], bool]
    hidden: bool = False
    """A wrong value may be a secret: it is not shown."""


def _is_count(least: int, most: float, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_real(low: float, high: float, above: bool, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (low < value if above else low <= value) and value <= high


def count(unit: str, least: int = 1, most: float = math.inf, more: str = "") -> Rule:
    span = f"{least} or more" if most == math.inf else f"{least} to {most}"
    return Rule(f"a number of {unit}, {span}{more}", partial(_is_count, least, most))


def real(low: float, high: float = math.inf, above: bool = False, what: str = "", more: str = "") -> Rule:
    """``above``: ``low`` itself is refused."""
    if high != math.inf:
        span = f"in {'(' if above else '['}{low:g}, {high:g}]"
    elif low == -math.inf:
        span = "that is finite"
    else:
        span = f"{'above ' if above else ''}{low:g}{'' if above else ' or more'}"
    return Rule(f"a number {span}{f' ({what})' if what else ''}{more}", partial(_is_real, low, high, above))


def choice(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def unset(rule: Rule) -> Rule:
    """The rule, or null."""
    return Rule(f"{rule.wanted}, or null", lambda value: value is None or rule.accepts(value))


def never(rule: Rule, value: int = -1, means: str = "never") -> Rule:
    """The rule, or the one number by which verl switches it off."""
    off = partial(_is_count, value, value)
    return Rule(f"{rule.wanted}, or {value} for {means}", lambda given: off(given) or rule.accepts(given))


def each(rule: Rule, or_one: bool = False, size: int | None = None) -> Rule:
    """A list of such values; with ``or_one`` a single one too."""

    def accepts(value: Any) -> bool:
        if or_one and rule.accepts(value):
            return True
        listed = isinstance(value, list) and size in (None, len(value))
        return listed and all(rule.accepts(item) for item in value)

    return Rule(f"a list of {'' if size is None else f'{size} numbers, each '}{rule.wanted}", accepts)


def nothing(why: str) -> Rule:
    return Rule(f"null: {why}", lambda value: value is None)


SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("text", lambda value: isinstance(value, str) and bool(value.strip()))
SEED = count("a seed", 0, _LARGEST_SEED)._replace(wanted=f"a whole number, 0 to {_LARGEST_SEED}")
# Whether it is a number, and its range: the method's class.
FINITE = Rule(
    "a finite number", lambda value: value not in (math.inf, -math.inf) and not isinstance(value, list | dict)
)
LOGGERS = ("console", "wandb", "tensorboard", "mlflow", "swanlab", "vemlp_wandb", "clearml", "trackio", "rl_insight")
_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "full")
_STRAIGHT = ("kl+", "k1+", "abs+", "mse+", "k2+", "low_var_kl+", "k3+", "full+")  # with a straight-through gradient
_IGNORED = (
    "verl ignores it where algorithm.rollout_correction.bypass_mode=true, as here; "
    "method=tis, mis or icepop, or method.importance"
)

# How models write a call: verl's parsers (a test compares).
TOOL_FORMATS = ("deepseek_v4", "gemma4", "glm", "gpt-oss", "hermes", "kimi", "minimax", "qwen3_coder", "seed")

_THRESHOLDS = {
    f"thresholds.{unit}.{name}": rule
    for unit in ("tv", "kl")
    for name, rule in (("delta", real(0, above=True)), ("delta_b", real(0)), ("dppo_delta", real(0, above=True)))
}
_METHOD = {
    f"method.{name}": FINITE
    for name in (
        *("delta", "delta_b", "delta_b_scale", "delta_b_max_factor", "delta_max", "delta_avg", "eps_low", "eps_high"),
        *("tau", "tau_pos", "tau_neg", "low", "high", "cap_pos", "cap_neg", "half_life", "safety", "dual_clip"),
        *("k_pos", "lambda_pos", "k_neg", "lambda_neg"),
    )
} | {"method.ratio_cap": FINITE._replace(wanted="a finite number, or null for no cap")}
_RUN = {
    "run.name": Rule("text", lambda value: not isinstance(value, list | dict)),
    "run.seed": SEED,
    "run.seeded_rollout": SWITCH,
    "run.mask_std_0": SWITCH,
    "run.train_all_rows": SWITCH,
    "run.staleness": count("steps", 0),
    "run.poll_interval": real(0, 60, above=True, what="seconds"),
    "run.tool_timeout": real(0, above=True, what="seconds"),
    "run.stall_minutes": unset(real(0, above=True))._replace(
        wanted="minutes without progress that end the run, above 0, or null for never"
    ),
    "run.private_variables": unset(
        each(Rule("a name", lambda value: isinstance(value, str) and value.isidentifier()))
    )._replace(wanted="the names of variables, not their values, e.g. [HF_TOKEN]", hidden=True),
    "run.dump_steps": each(count("a step")._replace(wanted="steps, 1 or more, e.g. [2]")),
    "run.inspect_every": count("steps", 0),
    "run.inspect_tokens": count("tokens"),
}
_DATA = {
    "data.train_batch_size": count("prompts"),
    "data.val_batch_size": unset(count("prompts")),
    "data.max_prompt_length": count("tokens"),
    "data.max_response_length": count("tokens"),
    "data.filter_overlong_prompts": SWITCH,
    "data.filter_overlong_prompts_workers": count("processes"),
    "data.truncation": choice("error", "left", "right", "middle"),
    "data.dataloader_num_workers": count("processes", 0),
    "data.shuffle": SWITCH,
    "data.validation_shuffle": SWITCH,
    "data.seed": unset(SEED),
    "data.train_max_samples": never(count("problems"), means="all"),
    "data.val_max_samples": never(count("problems"), means="all"),
    "data.prompt_key": TEXT,
    "data.reward_fn_key": TEXT,
    "data.trust_remote_code": SWITCH,
}
_MODEL = {
    "path": unset(TEXT),  # that it is set: check_files
    "trust_remote_code": SWITCH,
    "use_remove_padding": SWITCH,
    "use_fused_kernels": SWITCH,
    "use_liger": SWITCH,
    "use_shm": SWITCH,
    "enable_gradient_checkpointing": SWITCH,
    "enable_activation_offload": SWITCH,
    "lora_rank": count("ranks, 0 for none", 0),
    "lora_alpha": real(0, above=True),
}
_BATCHES = {
    "ppo_mini_batch_size": count("prompts"),
    "ppo_micro_batch_size_per_gpu": unset(count("responses")),
    "ppo_max_token_len_per_gpu": count("tokens"),
    "ppo_epochs": count("passes over a batch"),
    "use_dynamic_bsz": SWITCH,
    "shuffle": SWITCH,
    "data_loader_seed": SEED,
    "ulysses_sequence_parallel_size": count("GPUs"),
}
_LOSS = {
    "loss_agg_mode": choice(
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ),
    "loss_scale_factor": unset(real(0, above=True)),
    "entropy_coeff": real(-math.inf),
    "calculate_entropy": SWITCH,
    "use_kl_loss": SWITCH,
    "kl_loss_coef": real(0),
    "kl_loss_type": choice(*_KL, *_STRAIGHT),
    "use_torch_compile": SWITCH,
    "checkpoint.async_save": SWITCH,
}
_OPTIMIZER = {
    "lr": real(0, 1, above=True, what="learning rate"),
    "weight_decay": real(0),
    "betas": each(real(0, 1), size=2),
    "clip_grad": real(0, above=True, what="largest norm of the gradient"),
    "lr_warmup_steps": unset(count("steps", -1)),
    "lr_warmup_steps_ratio": real(0, 1),
    "min_lr_ratio": unset(real(0, 1)),
    "num_cycles": real(0),
    "lr_scheduler_type": choice("constant", "cosine"),
}
_ENGINE = {
    "param_offload": SWITCH,
    "optimizer_offload": SWITCH,
    "offload_policy": SWITCH,
    "reshard_after_forward": SWITCH,
    "forward_prefetch": SWITCH,
    "use_torch_compile": SWITCH,
    "full_determinism": SWITCH,
    "fsdp_size": never(count("GPUs"), means="all"),
    "model_dtype": choice("fp32", "float32", "bf16", "bfloat16", "fp16", "float16"),
    "seed": SEED,
}
_MEGATRON = {
    f"{what}_parallel_size": count("GPUs") for what in ("tensor_model", "pipeline_model", "context", "expert_model")
} | {"expert_tensor_parallel_size": unset(count("GPUs"))}
_LOG_PROBS = {
    "log_prob_micro_batch_size_per_gpu": unset(count("responses")),
    "log_prob_max_token_len_per_gpu": count("tokens"),
    "log_prob_use_dynamic_bsz": SWITCH,
}
_ROLLOUT_SWITCHES = (
    *("calculate_log_probs", "do_sample", "ignore_eos", "enforce_eager", "free_cache_engine", "disable_log_stats"),
    *("enable_chunked_prefill", "enable_prefix_caching", "enable_sleep_mode", "full_determinism"),
)
_ROLLOUT = {
    "n": count("responses a prompt", 2, more=": a group of one has no relative advantage"),
    "temperature": real(0, above=True, more=": at 0 all responses of a group are the same (validation: val_kwargs)"),
    "top_p": real(0, 1, above=True),
    "top_k": never(count("tokens", 0), means="all"),
    "seed": SEED,
    "dtype": choice("auto", "float32", "float", "bfloat16", "float16", "half"),
    "gpu_memory_utilization": real(0, 1, above=True, what="share of a card"),
    "max_model_len": unset(count("tokens")),
    "max_num_seqs": count("responses"),
    "max_num_batched_tokens": count("tokens"),
    "tensor_model_parallel_size": count("GPUs"),
    "data_parallel_size": count("GPUs"),
    "pipeline_model_parallel_size": count("GPUs"),
    "expert_parallel_size": count("GPUs"),
    "agent.num_workers": count("processes"),
    "agent.default_agent_loop": TEXT,
    "multi_turn.format": choice(*TOOL_FORMATS),
    "multi_turn.function_tool_path": unset(TEXT),
    "multi_turn.tool_config_path": unset(TEXT),
    "multi_turn.max_assistant_turns": unset(count("turns")),
    "multi_turn.max_user_turns": unset(count("turns")),
    "multi_turn.max_parallel_calls": count("calls"),
    "multi_turn.max_tool_response_length": count("characters"),
    "multi_turn.tool_response_truncate_side": choice("left", "middle", "right"),
    "checkpoint_engine.update_weights_bucket_megabytes": unset(count("MB")),
    "engine_kwargs.vllm.max_logprobs": unset(count("log-probabilities", -1)),
    **dict.fromkeys(_ROLLOUT_SWITCHES, SWITCH),
    "val_kwargs.n": count("samples a problem"),
    "val_kwargs.temperature": real(0),
    "val_kwargs.top_p": real(0, 1, above=True),
    "val_kwargs.top_k": never(count("tokens", 0), means="all"),
    "val_kwargs.do_sample": SWITCH,
}
_ALGORITHM = {
    "gamma": real(0, 1),
    "lam": real(0, 1),
    "norm_adv_by_std_in_grpo": SWITCH,
    "use_kl_in_reward": SWITCH,
    "kl_penalty": choice(*_KL, *_STRAIGHT),
    "kl_ctrl.type": choice("fixed", "adaptive"),
    "kl_ctrl.kl_coef": real(0),
    "kl_ctrl.horizon": real(0, above=True, what="steps"),
    "kl_ctrl.target_kl": real(0, above=True),
    "filter_groups.enable": SWITCH,
    "filter_groups.metric": unset(TEXT),
    "filter_groups.max_num_gen_batches": count("batches, 0 for any", 0),
    "rollout_correction.bypass_mode": SWITCH,
    "rollout_correction.rollout_is": nothing(_IGNORED),
    "rollout_correction.rollout_rs": nothing(_IGNORED),
}
_REWARD = {
    "num_workers": count("processes"),
    "custom_reward_function.path": unset(TEXT),
    "custom_reward_function.name": TEXT,
    "reward_manager.name": TEXT,
    "reward_kwargs.max_resp_len": count("tokens"),
    "reward_kwargs.overlong_buffer_cfg.enable": SWITCH,
    "reward_kwargs.overlong_buffer_cfg.log": SWITCH,
    "reward_kwargs.overlong_buffer_cfg.len": count("tokens", 0),
    "reward_kwargs.overlong_buffer_cfg.penalty_factor": real(0),
}
_TRAINER = {
    "device": choice("cpu", "cuda"),
    "nnodes": count("nodes"),
    "n_gpus_per_node": count("GPUs"),
    "total_epochs": count("epochs"),
    "total_training_steps": unset(count("steps")),
    "save_freq": never(count("steps", 0)),
    "test_freq": never(count("steps", 0)),
    "max_actor_ckpt_to_keep": unset(count("newest checkpoints to keep"))._replace(
        wanted="the number of newest checkpoints to keep, 1 or more, or null for all"
    ),
    "logger": unset(each(choice(*LOGGERS, "file"), or_one=True)),  # "file" has a reason of its own: check_run
    "log_val_generations": count("samples", 0),
    "critic_warmup": count("steps", 0),
    "esi_redundant_time": real(0, what="seconds"),
    "ray_wait_register_center_timeout": real(0, above=True, what="seconds"),
    "val_before_train": SWITCH,
    "val_only": SWITCH,
    "balance_batch": SWITCH,
    "use_v1": SWITCH,
    "del_local_ckpt_after_load": SWITCH,
    "project_name": TEXT,
    "experiment_name": Rule("text", lambda value: not isinstance(value, list | dict) and value not in (None, "")),
    "default_local_dir": TEXT,
    "validation_data_dir": unset(TEXT),
    "rollout_data_dir": unset(TEXT),
    "resume_mode": choice("disable", "auto", "resume_path"),
    "resume_from_path": unset(TEXT),
}
_V1 = {
    "sampler.max_off_policy_threshold": unset(count("steps")),
    "sampler.max_off_policy_strategy": choice("drop", "wait"),
    "colocate_async.num_warmup_batches": real(0, what="batches"),
    "separate_async.num_warmup_batches": real(0, what="batches"),
    "separate_async.parameter_sync_step": count("updates"),
}
_RAY = {
    "address": unset(TEXT),
    "num_cpus": unset(count("slots")),
    "num_gpus": unset(count("GPUs", 0)),
    "include_dashboard": unset(SWITCH),
    "object_store_memory": unset(count("bytes", 75 * 2**20)),  # Ray's own least
}


def _under(parent: str, rows: dict[str, Rule]) -> dict[str, Rule]:
    return {f"{parent}.{name}": rule for name, rule in rows.items()}


RULES: dict[str, Rule] = {
    **_THRESHOLDS,
    "thresholds.delta_b_quantile": unset(real(0, 1)),
    **_METHOD,
    **_RUN,
    **_DATA,
    **_under("actor_rollout_ref.model", _MODEL),
    **_under("actor_rollout_ref.actor", _BATCHES | _LOSS),
    **_under("actor_rollout_ref.actor.optim", _OPTIMIZER),
    **_under("actor_rollout_ref.actor.fsdp_config", _ENGINE),
    **_under("actor_rollout_ref.actor.megatron", _MEGATRON),
    **_under("actor_rollout_ref.ref", _LOG_PROBS),
    **_under("actor_rollout_ref.ref.fsdp_config", _ENGINE),
    **_under("actor_rollout_ref.rollout", _ROLLOUT | _LOG_PROBS),
    **_under("algorithm", _ALGORITHM),
    **_under("reward", _REWARD),
    **_under("trainer", _TRAINER),
    **_under("trainer.v1", _V1),
    **_under("ray_kwargs.ray_init", _RAY),
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": count("processes"),
    "transfer_queue.backend.SimpleStorage.total_storage_size": count("rows"),
    "quickstart.assets": TEXT,
    "smollm2.assets": TEXT,
}


def check_schema(config: DictConfig) -> Iterator[Problem]:
    """Every setting of the table whose value is of another type or out of its range."""
    for key, rule in RULES.items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent, throw_on_missing=False)
        if not isinstance(node, DictConfig):
            continue
        if name not in node or OmegaConf.is_interpolation(node, name):
            continue
        if not rule.accepts(value := _plain(node, name)):
            yield about(key, f"{'' if rule.hidden else f'={shown(value)}'}: give {rule.wanted}")


def _plain(node: DictConfig, name: str) -> Any:
    """The value, of a list or dict as Python's own."""
    if OmegaConf.is_missing(node, name):
        return "???"
    value = node[name]
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value


def shown(value: Any) -> str:
    """A value in a message: never long."""
    text = str(OmegaConf.to_container(value)) if isinstance(value, Container) else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"
