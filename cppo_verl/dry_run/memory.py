"""Memory of one GPU, estimated by part from the configuration and the model's shape: arithmetic, without torch or verl.

Every term is what verl 0.9.1's engines allocate, read from their code; docs/dry_run.md has the formulas, what they were
measured against, and what is left out.
"""

from dataclasses import dataclass, fields

from omegaconf import DictConfig

from cppo_verl.dry_run.model import Model

GIB = 2**30
# cppo_verl.adapters.actor.log_prob.CHUNK, which torch is needed to read.
LOG_PROB_CHUNK = 2**23
_BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Parts:
    """Bytes on one GPU."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    gathered: float = 0
    """FSDP: weights gathered from all ranks and gradients before they are reduced. Weight sync: what is sent."""
    activations: float = 0
    logits: float = 0
    step: float = 0
    """Of the optimizer's step: on GPUs torch's AdamW makes a tensor the size of all weights of this rank at once."""
    vllm: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Layout:
    """How the trainer's devices are divided, and what one of them is given at a time."""

    devices: int
    split: int
    """Devices that work on one response: tensor x pipeline x context parallelism, or Ulysses."""
    sequence: int
    """Devices that the tokens of one response are divided over."""
    data_parallel: int
    responses: int
    """Of a minibatch on one data-parallel rank."""
    longest: int
    """Tokens of the longest prompt with the longest response."""
    tokens: int
    """Of a micro-batch on one device, at most."""

    @classmethod
    def of(cls, config: DictConfig) -> "Layout":
        actor = config.actor_rollout_ref.actor
        devices = config.trainer.nnodes * config.trainer.n_gpus_per_node
        if actor.strategy == "megatron":
            sequence = actor.megatron.context_parallel_size
            split = sequence * actor.megatron.tensor_model_parallel_size * actor.megatron.pipeline_model_parallel_size
        else:
            sequence = max(actor.ulysses_sequence_parallel_size, actor.fsdp_config.ulysses_sequence_parallel_size)
            split = sequence
        ranks = max(devices // split, 1)
        responses = max(actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n // ranks, 1)
        longest = config.data.max_prompt_length + config.data.max_response_length
        if actor.use_dynamic_bsz:
            tokens = min(actor.ppo_max_token_len_per_gpu, -(-responses * longest // sequence))
        else:
            tokens = -(-actor.ppo_micro_batch_size_per_gpu * longest // sequence)
        return cls(devices, split, sequence, ranks, responses, longest, tokens)


@dataclass(frozen=True)
class Estimate:
    """Three moments of a step: training, sending the weights to vLLM, and generating."""

    update: Parts
    sync: Parts
    rollout: Parts


def estimate(config: DictConfig, model: Model, card: float | None) -> Estimate:
    """Peaks on the fullest GPU; ``card`` is its memory in bytes, None on CPUs (vLLM's share is then its weights)."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    layout = Layout.of(config)
    engine = _megatron if actor.strategy == "megatron" else _fsdp
    states, work, kept = engine(config, model, layout)
    served = vllm_weights(config, model)
    share = served if card is None else rollout.gpu_memory_utilization * card
    asleep = 0.0 if rollout.free_cache_engine else share
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20
    if actor.strategy == "megatron":  # loads its weights, sends them in their own type
        sending = Parts(weights=states.weights - kept.weights, gathered=bucket + 2 * model.head)
    else:  # gathers one float32 tensor after the other
        sending = Parts(gathered=bucket + _BYTES[actor.fsdp_config.model_dtype or "fp32"] * model.head)
    return Estimate(
        update=states + work + Parts(vllm=asleep),
        sync=kept + sending + Parts(vllm=asleep or served),
        rollout=kept + Parts(vllm=share),
    )


def host_bytes(config: DictConfig, model: Model) -> float:
    """Of one node's own memory: what its GPUs have offloaded to it while vLLM generates."""
    actor = config.actor_rollout_ref.actor
    engine = _megatron if actor.strategy == "megatron" else _fsdp
    layout = Layout.of(config)
    states, _, kept = engine(config, model, layout)
    # Gradients are dropped, not moved.
    moved = states.weights - kept.weights + states.optimizer - kept.optimizer
    if actor.strategy != "megatron" and actor.fsdp_config.offload_policy:  # all of it is never on the GPU
        moved = 4 * _stored(config, model, layout)
    return moved * config.trainer.n_gpus_per_node


def vllm_weights(config: DictConfig, model: Model) -> float:
    """Bytes of the weights on one GPU of a rollout replica."""
    rollout = config.actor_rollout_ref.rollout
    split = rollout.tensor_model_parallel_size * rollout.pipeline_model_parallel_size
    return _BYTES.get(rollout.dtype, 2) * model.parameters / split


def checkpoint_bytes(config: DictConfig, model: Model) -> float:
    """Of one saved step: what actor.checkpoint.save_contents names, all ranks' shards together."""
    actor = config.actor_rollout_ref.actor
    if actor.strategy == "megatron":  # weights as a bfloat16 Hugging Face model; float32 weights are the optimizer's
        sizes = {"model": 2, "optimizer": 12}
    else:
        stored = _BYTES[actor.fsdp_config.model_dtype or "fp32"]
        sizes = {"model": stored, "optimizer": 2 * stored, "hf_model": 2}
    return model.parameters * sum(sizes.get(part, 0) for part in actor.checkpoint.save_contents)


def key_value_bytes(config: DictConfig, model: Model) -> float:
    """Of one token in vLLM's cache, on one GPU; a head is not divided."""
    rollout = config.actor_rollout_ref.rollout
    heads = max(model.key_value_heads / rollout.tensor_model_parallel_size, 1)
    layers = model.layers / rollout.pipeline_model_parallel_size
    return 2 * _BYTES.get(rollout.dtype, 2) * layers * heads * model.head_dim


def _shards(config: DictConfig, layout: Layout) -> int:
    size = config.actor_rollout_ref.actor.fsdp_config.fsdp_size
    return size if 0 < size < layout.devices else layout.devices


def _stored(config: DictConfig, model: Model, layout: Layout) -> float:
    """Bytes of one GPU's part of the weights."""
    kind = config.actor_rollout_ref.actor.fsdp_config.model_dtype or "fp32"
    return _BYTES[kind] * model.parameters / _shards(config, layout)


def _fsdp(config: DictConfig, model: Model, layout: Layout) -> tuple[Parts, Parts, Parts]:
    """(states of the update, what it allocates beyond them at its peak, states that stay while vLLM generates)."""
    actor, settings = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    engine, tokens = actor.fsdp_config, layout.tokens
    shards, stored = _shards(config, layout), _stored(config, model, layout)
    states = Parts() if engine.offload_policy else Parts(weights=stored, gradients=stored, optimizer=2 * stored)
    kept = Parts(
        weights=0 if engine.param_offload else states.weights,
        optimizer=0 if engine.optimizer_offload else states.optimizer,
    )
    precision = engine.get("mixed_precision") or {}
    compute = _BYTES[precision.get("param_dtype", "bf16")]
    reduce = _BYTES[precision.get("reduce_dtype", "fp32")]

    flash = _flash(settings)
    mask = 0 if flash else compute * (tokens if settings.use_remove_padding else layout.longest)
    of_layer = tokens * (_layer_activations(model, compute, repeated=not flash) + mask)
    ends = tokens * ((4 + 2 * compute) * model.hidden + 2 * compute * model.head_dim)  # last norm, rotary tables
    backward: float = tokens * compute * (model.hidden + 2 * model.experts_per_token * model.intermediate)
    saved = model.layers * of_layer + ends
    if settings.enable_gradient_checkpointing:
        saved, backward = model.layers * tokens * compute * model.hidden + ends, backward + of_layer
    logits, gradient = _logit_bytes(config, compute, tokens * model.vocabulary)
    prefetched = 1 if shards > 1 else 0
    tied = 2 * model.head if model.tied else 0
    # The layer in work and the next one, its gradients, and those of the layer before on their way.
    ahead = (2 + prefetched) * model.layer + tied
    moments = (
        Parts(gathered=compute * prefetched * model.layer, activations=saved, logits=logits),
        # The logits have become their own gradient when the head is gathered and its gradient made.
        Parts(gathered=compute * (2 * model.head + prefetched * model.layer), activations=saved, logits=gradient),
        Parts(gathered=compute * ahead + prefetched * reduce * model.layer, activations=saved + backward),
        Parts(gathered=compute * 2 * model.head + max(compute * tied, reduce * model.head)),
        Parts(step=states.weights if config.trainer.device != "cpu" else 0),
    )
    return states, max(moments, key=lambda moment: moment.total), kept


def _layer_activations(model: Model, compute: int, repeated: bool) -> float:
    """Bytes a token that transformers' layer saves for its backward pass, in ``compute``-byte autocast.

    ``repeated``: keys and values are copied for every query head (any attention but flash-attn's).
    """
    query, key = 2 * compute * model.query, compute * model.key_value
    value = key
    if model.qk_norm:  # the norm's input in float32, and what it was scaled to
        query += (4 + compute) * model.query
        key += (4 + compute) * model.key_value
    if repeated:
        key += compute * (model.query - model.key_value)
        value = compute * model.query
    norms = (8 + 4 * compute) * model.hidden
    scales = 4 * (2 + 2 * model.heads + model.key_value_heads)
    mlp = 4 * compute * model.experts_per_token * model.intermediate
    if model.experts:  # router in float32, tokens permuted to their experts and back
        mlp += 8 * model.experts + 3 * compute * model.experts_per_token * model.hidden
    return norms + query + key + value + scales + mlp


def _logit_bytes(config: DictConfig, compute: int, elements: int) -> tuple[float, float]:
    """(bytes of the logits at the peak of the log-probabilities, those of their gradient afterwards)."""
    actor, settings = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if settings.use_fused_kernels:
        return 0, 0
    entropy = actor.calculate_entropy or bool(actor.entropy_coeff)
    # flash-attn's cross-entropy; ours widens a chunk at a time, and the entropy needs two of them.
    kernel = config.trainer.device != "cpu" and _flash(settings) and not entropy
    kernel = kernel and config.actor_rollout_ref.rollout.temperature == 1
    wide = 0 if kernel else 4 * min(elements, LOG_PROB_CHUNK) * (2 if entropy else 1)
    size = compute * elements
    if settings.use_remove_padding:
        return size + wide, size
    # Copied without the padding; then the copy, its rows and the padded gradient.
    return max(2 * size + wide, 3 * size), size


def _flash(settings: DictConfig) -> bool:
    """Whether flash-attn is asked for, and so installed."""
    return bool(settings.get("override_config", {}).get("attn_implementation", "flash_attention_2").startswith("flash"))


def _megatron(config: DictConfig, model: Model, layout: Layout) -> tuple[Parts, Parts, Parts]:
    """As _fsdp, in bfloat16 with float32 gradients and Adam; expert load is taken as balanced."""
    actor, tokens = config.actor_rollout_ref.actor, layout.tokens
    split, transformer = actor.megatron, actor.megatron.get("override_transformer_config") or {}
    tensor, pipeline = split.tensor_model_parallel_size, split.pipeline_model_parallel_size
    expert_tensor = split.expert_tensor_parallel_size or tensor
    experts_over = split.expert_model_parallel_size * expert_tensor if model.experts else tensor
    layers = -(-model.layers // pipeline)
    ends = model.head * (1 if model.tied or pipeline > 1 else 2)
    dense = layers * (model.attention / tensor + model.replicated) + ends / tensor + model.hidden
    sparse = layers * model.mlp * max(model.experts, 1) / experts_over
    optimizer = 12 * (dense + sparse)
    if split.use_distributed_optimizer:  # over the ranks that hold the same weights
        optimizer = 12 * (dense * tensor + sparse * experts_over) * pipeline / layout.devices
    states = Parts(weights=2 * (dense + sparse), gradients=4 * (dense + sparse), optimizer=optimizer)
    kept = Parts(
        weights=0 if split.param_offload else states.weights,
        gradients=0 if split.param_offload else states.gradients,
        optimizer=0 if split.optimizer_offload else states.optimizer,
    )

    sequence = tensor if split.sequence_parallel else 1
    of_layer = tokens * _megatron_layer_activations(model, tensor, sequence, expert_tensor)
    backward = tokens * 4 * model.experts_per_token * model.intermediate / tensor
    if transformer.get("recompute_granularity") == "full":
        saved, backward = layers * tokens * 2 * model.hidden / sequence, backward + of_layer
    else:
        saved = layers * of_layer
    # bfloat16 logits and float32 probabilities; the entropy keeps a copy of both.
    entropy = actor.calculate_entropy or bool(actor.entropy_coeff)
    fused = config.actor_rollout_ref.model.use_fused_kernels
    logits = 0 if fused else tokens * model.vocabulary / tensor * (10 if entropy else 6)
    moments = (
        Parts(activations=pipeline * saved + backward),  # the first stage holds a micro-batch of every stage
        Parts(activations=saved, logits=logits),
        Parts(activations=saved + backward),
    )
    return states, max(moments, key=lambda moment: moment.total), kept


def _megatron_layer_activations(model: Model, tensor: int, sequence: int, expert_tensor: int) -> float:
    """Bytes a token that Megatron-core's layer saves without recomputation, in bfloat16 with flash attention."""
    norms = 8 * model.hidden / sequence
    attention = 2 * (2 * model.query + 2 * model.key_value) / tensor
    if model.qk_norm:
        attention += 2 * (model.query + model.key_value) / tensor
    if not model.experts:
        return norms + attention + 6 * model.intermediate / tensor
    routed = model.experts_per_token * (8 * model.hidden + 6 * model.intermediate / expert_tensor)
    return norms + attention + (8 * model.experts + routed) / sequence
