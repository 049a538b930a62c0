"""What we rely on in verl and vLLM: the version, and the signatures of the private seams. Checked before Ray starts."""

import ast
import importlib.util
import inspect
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERL_VERSION = "0.9.1"


class IncompatibleError(RuntimeError):
    """An installed package is not the one this release was written for."""


def check_verl_version() -> None:
    """Raise IncompatibleError unless verl is exactly the pinned version. Imports nothing of verl."""
    try:
        found = version("verl")
    except PackageNotFoundError:
        raise IncompatibleError("verl is not installed; run scripts/setup.sh") from None
    if found != VERL_VERSION:
        raise IncompatibleError(
            f"verl {found} is installed, but cppo_verl uses private parts of verl {VERL_VERSION}; "
            f"run scripts/setup.sh, or: pip install verl=={VERL_VERSION}"
        )


def check() -> None:
    """Assert version and signatures of everything we override or call. Imports verl (a few seconds)."""
    check_verl_version()
    problems = [problem for seam, wanted in _verl_seams() if (problem := _mismatch(seam, wanted))]
    for package, seams in (("vllm", _VLLM_SEAMS), ("verl", _VERL_SOURCE_SEAMS)):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise IncompatibleError(f"{package} is not installed; run scripts/setup.sh")
        problems += source_mismatches(Path(spec.origin).parent, seams)
    if problems:
        raise IncompatibleError("verl or vLLM differs from what cppo_verl was written for: " + "; ".join(problems))


def let_separate_async_log() -> None:
    """Let verl's separate_async start with ``hybrid_engine=false``, where it hands ``print``'s flush to its logger.

    trainer_separate_async.py:181 of verl 0.9.1: a TypeError. tests/adapters/test_compat.py tells when it is mended.
    """
    from verl.trainer.ppo.v1 import trainer_separate_async

    class Unflushed(logging.LoggerAdapter):
        def process(self, message: Any, options: Any) -> tuple[Any, Any]:
            return message, {name: value for name, value in options.items() if name != "flush"}

    trainer_separate_async.logger = Unflushed(logging.getLogger(trainer_separate_async.__name__), {})


# (file inside the vllm package, class or function, the fields, methods, parameters or names in it that we rely on)
Seam = tuple[str, str, tuple[str, ...]]
_VLLM_SEAMS: tuple[Seam, ...] = (
    (
        "sampling_params.py",
        "SamplingParams",
        (
            *("seed", "logprobs", "temperature", "top_p", "top_k", "max_tokens", "extra_args"),
            *("output_kind", "detokenize", "stop", "num_logprobs"),
        ),
    ),
    (
        "v1/engine/logprobs.py",
        "LogprobsProcessor",
        (
            *("tokenizer", "logprobs", "prompt_logprobs", "cumulative_logprob", "num_logprobs", "num_prompt_logprobs"),
            *("from_new_request", "_update_sample_logprobs"),
        ),
    ),
    ("v1/engine/output_processor.py", "RequestState", ("LogprobsProcessor", "from_new_request")),
    ("v1/engine/output_processor.py", "OutputProcessor", ("external_req_ids",)),
    ("v1/engine/async_llm.py", "AsyncLLM.generate", ("prompt", "sampling_params", "request_id")),
    ("v1/outputs.py", "LogprobsLists", ("logprob_token_ids", "logprobs")),
    ("model_executor/layers/utils.py", "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
)

# In verl, what signatures do not show; and the module that imports all of vLLM, which is not to be waited for here.
_SERVER = "workers/rollout/vllm_rollout/vllm_async_server.py"
_VERL_SOURCE_SEAMS: tuple[Seam, ...] = (
    (_SERVER, "vLLMHttpServer.run_server", ("self", "args")),
    (_SERVER, "vLLMHttpServer.generate", ("self", "prompt_ids", "sampling_params", "request_id")),
    ("workers/rollout/vllm_rollout/vllm_rollout.py", "ServerAdapter", ("_execute_method", "BucketedWeightSender")),
    ("workers/rollout/vllm_rollout/bucketed_weight_transfer.py", "BucketedWeightSender._init_socket", ("self",)),
    ("workers/rollout/replica.py", "RolloutReplica.get_ray_class_with_init_args", ("self",)),
    ("trainer/ppo/v1/trainer_base.py", "PPOTrainer", ("_setup", "actor_rollout_wg", "reward_loop_manager")),
    ("trainer/ppo/v1/agent_loop_tq.py", "AgentLoopWorkerTQ", ("tq", "list_of_dict_to_tensordict")),
    (
        "workers/engine/fsdp/transformer_impl.py",
        "FSDPEngineWithLMHead",
        ("distillation_only", "distillation_use_topk", "calculate_entropy", "temperature_is_one", "temperature_rmpad"),
    ),
)


def source_mismatches(package: Path, seams: tuple[Seam, ...] = _VLLM_SEAMS) -> list[str]:
    """What is missing from the sources in ``package``; read, not imported, so that any version can be checked."""
    problems = []
    for file, name, wanted in seams:
        path = package / file
        tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
        body: list[ast.stmt] = tree.body
        *outer, name = name.split(".")
        for word in outer:
            body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == word), [])
        found = next((_names(node) for node in body if getattr(node, "name", None) == name), None)
        absent = wanted if found is None else [word for word in wanted if word not in found]
        if absent:
            problems.append(f"{package.name}/{file}: {name} lacks {', '.join(absent)}")
    return problems


def _names(node: ast.stmt) -> set[str]:
    """Parameters of a function; or a class's annotated fields, methods, and what these look up or assign."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
    body = getattr(node, "body", [])
    fields = {item.target.id for item in body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    methods = [item for item in body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = [node for item in methods for node in ast.walk(item)]
    looked_up = {node.id for node in inside if isinstance(node, ast.Name)}
    assigned = {node.attr for node in inside if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return fields | {item.name for item in methods} | looked_up | assigned


def _verl_seams() -> list[tuple[Callable[..., Any], tuple[str, ...]]]:
    """(callable, the parameter names we pass or override)."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.core_algos import agg_loss, kl_penalty
    from verl.trainer.ppo.metric_utils import bootstrap_metric
    from verl.trainer.ppo.v1 import PPOTrainerSync
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.utils import tensordict_utils
    from verl.utils.distributed import initialize_global_process_group_ray
    from verl.utils.tracking import Tracking
    from verl.utils.ulysses import slice_input_tensor
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
    from verl.workers.rollout.llm_server import LLMServerClient
    from verl.workers.rollout.replica import RolloutReplicaRegistry
    from verl.workers.utils.padding import no_padding_2_padding

    from cppo_verl.adapters import store

    agent_loop_worker = AgentLoopWorkerTQ.__ray_metadata__.modified_class
    return [
        (run_ppo, ("config", "task_runner_class")),
        (store.rendezvous._create_c10d_store, ("hostname", "port", "rank", "world_size", "timeout", "use_libuv")),
        (agg_loss, ("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens", "loss_scale_factor")),
        (bootstrap_metric, ("data", "subset_size", "reduce_fns", "n_bootstrap", "seed")),
        (kl_penalty, ("logprob", "ref_logprob", "kl_penalty")),
        (no_padding_2_padding, ("tensor", "data")),
        (initialize_global_process_group_ray, ("timeout_second", "backend")),
        (SingleTurnAgentLoop.run, ("self", "sampling_params", "priority", "kwargs")),
        (ActorRolloutRefWorker.init_model, ("self",)),
        (ActorRolloutRefWorker.set_loss_fn, ("self", "loss_fn")),
        (TrainingWorker.__init__, ("self", "config")),
        (TrainingWorker.train_mini_batch, ("self", "data")),
        (TrainingWorker.train_batch, ("self", "data")),
        (FSDPEngineWithLMHead.prepare_model_outputs, ("output", "output_args", "micro_batch", "logits_processor_func")),
        (EngineRegistry.register, ("model_type", "backend", "device")),
        (FSDPEngineWithLMHead.__init__, ("self", "model_config")),
        (slice_input_tensor, ("x", "dim")),
        (RolloutReplicaRegistry.register, ("name", "loader")),
        (agent_loop_worker._run_agent_loop, ("self", "sampling_params", "trajectory", "agent_name", "trace")),
        (agent_loop_worker._compute_score, ("self", "outputs", "kwargs")),
        (RewardLoopWorker.compute_score_batch, ("self", "data")),
        (LLMServerClient._acquire_server, ("self", "request_id")),
        (LLMServerClient._release_server, ("self", "server_id", "request_id")),
        (PPOTrainerSync.get_llm_client, ("self",)),
        (AgentLoopOutput.as_dict, ("self",)),
        (ReplayBuffer.__init__, ("poll_interval",)),
        (TaskRunnerV1.__ray_metadata__.modified_class.init_agent_loop_manager, ("self",)),
        (Tracking.log, ("self", "data", "step")),
        (PPOTrainerSync.on_sample_begin, ("self",)),
        (PPOTrainerSync.on_validate_begin, ("self",)),
        (PPOTrainerSync.on_init_end, ("self",)),
        (PPOTrainerSync.on_step_end, ("self",)),
        (ReplayBuffer._sync_metadata_from_transfer_queue, ("self",)),
        (ReplayBuffer._evict_terminal_groups, ("self", "global_steps", "partition_id", "eviction_reasons")),
        (PPOTrainerSync.fit, ("self", "agent_loop_manager")),
        (tensordict_utils.get_non_tensor_data, ("data", "key", "default")),
        (tensordict_utils.assign_non_tensor, ("tensor_dict",)),
        (PPOTrainerSync._build_replay_buffer, ("self",)),
        (PPOTrainerSync._init_resource_pool_mgr, ("self",)),
        (PPOTrainerSync._load_checkpoint, ("self",)),
        (PPOTrainerSync._save_checkpoint, ("self",)),
        (PPOTrainerSync._submit_batch_to_rollout, ("self", "batch")),
        (PPOTrainerSync._balance_batch, ("self", "batch", "metrics")),
        (PPOTrainerSync._compute_advantage, ("self", "batch", "metrics")),
        (PPOTrainerSync._update_actor, ("self", "batch", "metrics")),
        (
            PPOTrainerSync._dump_generations,
            ("self", "inputs", "outputs", "gts", "scores", "reward_extra_infos_dict", "dump_path"),
        ),
        (PPOTrainerSync._val_metrics_update, ("self", "data_sources", "sample_uids")),
        (PPOTrainerSync.step, ("self", "metrics", "timing_raw")),
    ]


def _mismatch(seam: Callable[..., Any], wanted: tuple[str, ...]) -> str | None:
    found = tuple(inspect.signature(seam).parameters)
    absent = [name for name in wanted if name not in found]
    return f"{seam.__qualname__} has no parameter {', '.join(absent)} (it has {', '.join(found)})" if absent else None
