"""Whether the method, the divergence, verl's modes, the rollout and the engine fit each other."""

import logging
from collections.abc import Iterator
from dataclasses import is_dataclass

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.adapters.columns import AGENT_LOOP, TOOL_LOOP
from cppo_verl.config import model_folder
from cppo_verl.methods import MEASURES, defined_on
from cppo_verl.problems import Problem, about

MODES = ("sync", "colocate_async", "separate_async")
_DEFINED_ON = {
    "kl": "a KL divergence; use divergence=topk_kl, or method.allow_tv=true to go on with its KL thresholds on a total "
    "variation",
    "tv": "a total variation; use divergence=binary_tv or topk_tv",
}


def check_method(config: DictConfig) -> Iterator[Problem]:
    """The method's class, its fields and their types, its own checks; KL thresholds on a total variation."""
    settings = {name: value for name, value in config.method.items() if name != "_target_"}
    target = config.method.get("_target_")
    log = logging.getLogger("hydra.utils")
    log.disabled = True  # it would say the same in other words
    try:
        method = get_class(str(target))
    except Exception as error:  # of the module, which may be anybody's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield about("method._target_", f"={target} cannot be imported: {reason}")
        return
    finally:
        log.disabled = False
    if not is_dataclass(method):
        yield about("method._target_", f"={target} is not a dataclass of settings (docs/adding_a_method.md)")
        return
    try:
        schema = OmegaConf.structured(method)
        OmegaConf.set_readonly(schema, False)
        OmegaConf.to_object(OmegaConf.merge(schema, settings))
    except OmegaConfBaseException as error:  # a value of the wrong type
        yield about(f"method.{error.full_key}", f": {str(error).splitlines()[0]}")
    except ValueError as error:  # the method's own check
        yield Problem("method", str(error))
    kind = defined_on(method, config.method)
    if kind not in (None, config.divergence.kind):
        yield about("divergence", f"={config.divergence.name}: {config.method.name} is defined on {_DEFINED_ON[kind]}")


def check_divergence(config: DictConfig) -> Iterator[Problem]:
    """Whether the Top-K log-probabilities can be had: from vLLM, and in the actor from verl's logits hook."""
    name, k = config.divergence.name, config.divergence.k
    if name not in MEASURES:
        yield about("divergence.name", f"={name}: choose one of {', '.join(MEASURES)} by divergence=")
        return
    over_topk = MEASURES[name].over_topk
    if not isinstance(k, int) or (k < 1 if over_topk else k != 0):
        yield about("divergence.k", f"={k}: {name} needs " + ("a number of tokens, 1 or more" if over_topk else "k=0"))
        return
    if not over_topk:
        return
    if config.divergence.log_prob_dtype not in ("float32", "float16"):
        yield about("divergence.log_prob_dtype", f"={config.divergence.log_prob_dtype}: use float32 or float16")
    instead = "or choose divergence=binary_tv, which does not look at the logits"
    actor, model, rollout = (config.actor_rollout_ref[part] for part in ("actor", "model", "rollout"))
    vocabulary = model_folder.shape(model.path).get("vocab_size")
    if isinstance(vocabulary, int) and k > vocabulary:
        yield about(
            "divergence.k", f"={k}: the vocabulary of actor_rollout_ref.model.path has only {vocabulary} tokens"
        )
    if model.use_fused_kernels:
        yield about(
            "actor_rollout_ref.model.use_fused_kernels",
            f"=true: fused kernels never form the logits that divergence={name} reads; set false, {instead}",
        )
    engine = actor.megatron if actor.strategy == "megatron" else actor.fsdp_config
    if actor.get("pad_to_length", False) or engine.get("pad_to_length", False):
        yield about(
            "pad_to_length", f"=true: verl's engine refuses it where the loss reads the logits; set false, {instead}"
        )
    if actor.strategy == "megatron" and engine.get("dynamic_context_parallel", False):
        yield about("actor_rollout_ref.actor.megatron.dynamic_context_parallel", f"=true: set false, {instead}")
    if actor.strategy == "megatron" and (engine.get("override_transformer_config") or {}).get("fp8"):
        yield about("actor_rollout_ref.actor.megatron.override_transformer_config.fp8", f": switch it off, {instead}")
    if rollout.get("disaggregation", {}).get("enabled", False):
        yield about("actor_rollout_ref.rollout.disaggregation.enabled", f"=true: set false, {instead}")
    limit = rollout.engine_kwargs.vllm.get("max_logprobs")
    if limit != -1 and (20 if limit is None else limit) < k:  # 20: vLLM's own default
        yield about(
            "actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs",
            f"={limit} is less than divergence.k={k}; leave it alone, it follows divergence.k",
        )


def check_verl_mode(config: DictConfig) -> Iterator[Problem]:
    """What verl can do and a trust region around the rollout's policy cannot go with."""
    actor = config.actor_rollout_ref.actor
    if not config.trainer.use_v1:
        yield about(
            "trainer.use_v1", "=false: verl's V0 trainer replaces the policy loss; only the V1 trainer is supported"
        )
    if config.trainer.v1.trainer_mode not in MODES:
        yield about(
            "trainer.v1.trainer_mode", f"={config.trainer.v1.trainer_mode}: choose one of {', '.join(MODES)} by mode="
        )
    if not config.algorithm.rollout_correction.bypass_mode:
        yield about(
            "algorithm.rollout_correction.bypass_mode",
            "=false: the trust region is anchored to the rollout's own log-probabilities; leave it true",
        )
    if config.algorithm.adv_estimator != "grpo":
        yield about(
            "algorithm.adv_estimator", f"={config.algorithm.adv_estimator}: advantages are group-relative; use grpo"
        )
    if actor.policy_loss.get("_target_") != "cppo_verl.adapters.actor.loss.TrustRegionConfig":
        yield about("actor_rollout_ref.actor.policy_loss._target_", " was changed; choose the loss by method= instead")
    if actor.get("grad_clip", 1.0) != 1.0:
        yield about(
            "actor_rollout_ref.actor.grad_clip",
            " is not read by verl's engine; set actor_rollout_ref.actor.optim.clip_grad",
        )
    if config.get("distillation", {}).get("enabled", False):
        yield about("distillation.enabled", "=true: verl's distillation replaces the policy loss; set false")
    if any(value is not None for value in config.custom_reward_function.values()):
        yield about(
            "custom_reward_function", ".* is ignored by verl 0.9.1; set reward.custom_reward_function.* instead"
        )


def check_async(config: DictConfig) -> Iterator[Problem]:
    """What verl's asynchronous trainers assert when Ray has started, and what no seed can decide there."""
    mode, rollout = config.trainer.v1.trainer_mode, config.actor_rollout_ref.rollout
    if mode == "sync":
        return
    if config.run.staleness:
        yield about(
            "run.staleness",
            f"={config.run.staleness}: how far mode={mode} lies behind is its own affair; use mode=sync",
        )
    if rollout.full_determinism:
        yield about(
            "actor_rollout_ref.rollout.full_determinism",
            f"=true: with mode={mode} the moment at which a response is interrupted depends on nothing that can be "
            "set; set false, or mode=sync",
        )
    if mode != "separate_async":
        return
    settings, actor = config.trainer.v1.separate_async, config.actor_rollout_ref.actor
    updates, prompts = settings.parameter_sync_step, config.data.train_batch_size
    if prompts != updates * actor.ppo_mini_batch_size:
        fitting = prompts // actor.ppo_mini_batch_size
        yield about(
            "trainer.v1.separate_async.parameter_sync_step",
            f"={updates} updates of actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} prompts "
            f"are not data.train_batch_size={prompts}; give {fitting}"
            + ("" if fitting * actor.ppo_mini_batch_size == prompts else ", and a multiple as batch size"),
        )
    for name in ("nnodes", "n_gpus_per_node"):
        if not (isinstance(rollout[name], int) and rollout[name] > 0):
            yield about(
                f"actor_rollout_ref.rollout.{name}",
                f"={rollout[name]}: give the servers devices of their own, 1 or more",
            )
    backend = rollout.checkpoint_engine.backend
    if backend == "naive":
        yield about(
            "actor_rollout_ref.rollout.checkpoint_engine.backend",
            "=naive: it reaches servers on the training devices only; use nccl (without a GPU: shared_memory)",
        )
    if backend == "shared_memory" and (config.trainer.nnodes, rollout.nnodes) != (1, 1):
        yield about(
            "actor_rollout_ref.rollout.checkpoint_engine.backend",
            "=shared_memory: actor and servers must be on one node; set trainer.nnodes=1 and rollout.nnodes=1",
        )


def check_rollout(config: DictConfig) -> Iterator[Problem]:
    """Whether log mu will be that of the policy which sampled, and a group has an advantage."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != "vllm":
        yield about("actor_rollout_ref.rollout.name", f"={rollout.name}: only vllm is supported")
    if rollout.top_p < 1 or rollout.top_k > 0:
        yield about(
            "actor_rollout_ref.rollout.top_p",
            f"={rollout.top_p}, top_k={rollout.top_k}: training samples must come from "
            "the whole softmax, or log mu is not the policy's; use top_p=1.0 top_k=-1 (validation: val_kwargs)",
        )
    if not rollout.calculate_log_probs:
        yield about(
            "actor_rollout_ref.rollout.calculate_log_probs", "=false: its log-probabilities are needed; set true"
        )
    if rollout.logprobs_mode != "processed_logprobs":
        yield about("actor_rollout_ref.rollout.logprobs_mode", f"={rollout.logprobs_mode}: must be processed_logprobs")
    yield from _check_length(config)
    if rollout.agent.default_agent_loop not in (AGENT_LOOP, TOOL_LOOP):
        yield about(
            "actor_rollout_ref.rollout.agent.default_agent_loop",
            f"={rollout.agent.default_agent_loop}: only {AGENT_LOOP} and {TOOL_LOOP} ask for what the trust region "
            "needs",
        )
    # Shorter than the longest prompt alone it may do, where the data's prompts are short; the dry run warns.
    length, sizes = rollout.max_model_len, (config.data.max_prompt_length, config.data.max_response_length)
    if length is not None and length <= min(sizes):
        yield about(
            "actor_rollout_ref.rollout.max_model_len",
            f"={length} holds neither a prompt of {sizes[0]} tokens (data.max_prompt_length) nor a response of "
            f"{sizes[1]} (data.max_response_length); give their sum, or null",
        )


def _check_length(config: DictConfig) -> Iterator[Problem]:
    """Whether the model has a position for every token that vLLM is to make room for; verl asks too late."""
    length = config.actor_rollout_ref.rollout.max_model_len
    positions = model_folder.shape(config.actor_rollout_ref.model.path).get("max_position_embeddings")
    if isinstance(length, int) and isinstance(positions, int) and length > positions:
        yield about(
            "actor_rollout_ref.rollout.max_model_len",
            f"={length} is more than the {positions} positions of actor_rollout_ref.model.path; give at most as many",
        )


def check_engine(config: DictConfig) -> Iterator[Problem]:
    """The actor's engine on this platform, and the sizes of batch, minibatch and micro-batch."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    on_cpu = config.trainer.device == "cpu"
    if on_cpu and model.use_fused_kernels:
        yield about("actor_rollout_ref.model.use_fused_kernels", "=true: fused kernels need a GPU; set false")
    if actor.get("pad_to_length", False) and not model.use_remove_padding:
        yield about(
            "actor_rollout_ref.actor.pad_to_length",
            "=true pads packed sequences; it needs model.use_remove_padding=true",
        )
    if on_cpu and actor.strategy != "fsdp2":
        yield about("actor_rollout_ref.actor.strategy", f"={actor.strategy}: on the CPU only fsdp2 runs")
    yield from _check_log_probs(config)
    if config.data.train_batch_size % actor.ppo_mini_batch_size:
        yield about(
            "data.train_batch_size",
            f"={config.data.train_batch_size} must be a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} (both count prompts)",
        )
    yield from _check_micro_batch(config)


def _check_log_probs(config: DictConfig) -> Iterator[Problem]:
    """Where verl would round log pi to bfloat16 out of our reach (docs/topk.md, "What each number is computed in")."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    temperature = config.actor_rollout_ref.rollout.temperature
    if config.trainer.device != "cpu" and actor.strategy not in ("fsdp", "fsdp2", "megatron"):
        yield about(
            "actor_rollout_ref.actor.strategy",
            f"={actor.strategy}: its log-probabilities can be rounded to bfloat16; use fsdp2, fsdp or megatron",
        )
    backend = "triton" if actor.strategy == "megatron" else model.fused_kernel_options.impl_backend
    if model.use_fused_kernels and backend != "triton" and temperature != 1:
        yield about(
            "actor_rollout_ref.rollout.temperature",
            f"={temperature}: verl's fused kernels (impl_backend={backend}) divide bfloat16 logits by it; use 1.0, "
            "or actor_rollout_ref.model.use_fused_kernels=false",
        )


def _check_micro_batch(config: DictConfig) -> Iterator[Problem]:
    """verl splits a rank's share of a minibatch into equal micro-batches, or fails in the first update."""
    actor = config.actor_rollout_ref.actor
    micro = actor.ppo_micro_batch_size_per_gpu
    if actor.use_dynamic_bsz:
        return
    if micro is None:
        yield about(
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
            " is not set (responses per forward pass); give a number, or actor_rollout_ref.actor.use_dynamic_bsz=true",
        )
        return
    responses, ranks = _minibatch(config)
    if ranks and responses % ranks == 0 and responses % (ranks * micro):
        yield about(
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
            f"={micro} must divide the {responses} responses of a "
            f"minibatch (ppo_mini_batch_size x rollout.n) spread over {ranks} data-parallel ranks",
        )


def check_parallelism(config: DictConfig) -> Iterator[Problem]:
    """How the GPUs are divided: what verl or Megatron would refuse after the cluster has started."""
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    devices, split = trainer.nnodes * trainer.n_gpus_per_node, _model_parallel_size(config)
    given = f"trainer.nnodes x trainer.n_gpus_per_node = {devices}"
    if devices < split:
        yield Problem(
            "trainer.nnodes",
            f"{given} is less than one copy of the model takes ({split}: tensor, pipeline, context and sequence "
            "parallelism)",
        )
    elif devices % split:
        yield Problem(
            "trainer.nnodes",
            f"{given} is not a multiple of the {split} of tensor, pipeline, context and sequence parallelism",
        )
    tensor = rollout.tensor_model_parallel_size
    replica = tensor * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    if devices % replica:
        yield about(
            "actor_rollout_ref.rollout.tensor_model_parallel_size",
            f"={tensor}: {given} is not a multiple of a vLLM "
            f"replica's {replica} (tensor, data and pipeline parallelism)",
        )
    if actor.strategy == "megatron" and (experts := actor.megatron.expert_model_parallel_size) > 1:
        tensor = actor.megatron.expert_tensor_parallel_size or actor.megatron.tensor_model_parallel_size
        if devices % (over := experts * tensor * actor.megatron.pipeline_model_parallel_size):
            yield about(
                "actor_rollout_ref.actor.megatron.expert_model_parallel_size",
                f"={experts}: {given} is not a multiple of "
                f"the {over} of expert, expert-tensor and pipeline parallelism",
            )
    responses, ranks = _minibatch(config)
    if ranks and responses % ranks:
        yield about(
            "actor_rollout_ref.actor.ppo_mini_batch_size",
            f"={actor.ppo_mini_batch_size}: its {responses} responses "
            f"cannot be divided over {ranks} data-parallel ranks",
        )


def _minibatch(config: DictConfig) -> tuple[int, int]:
    """(responses of a minibatch, data-parallel ranks they are spread over: 0 where the GPUs are not enough for one)."""
    devices = config.trainer.nnodes * config.trainer.n_gpus_per_node
    responses = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    return responses, devices // _model_parallel_size(config)


def _model_parallel_size(config: DictConfig) -> int:
    actor = config.actor_rollout_ref.actor
    if actor.strategy == "megatron":
        split = actor.megatron
        return int(split.tensor_model_parallel_size * split.pipeline_model_parallel_size * split.context_parallel_size)
    return int(max(actor.get("ulysses_sequence_parallel_size", 1), actor.fsdp_config.ulysses_sequence_parallel_size))
