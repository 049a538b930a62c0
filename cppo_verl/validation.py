"""Checks of a composed configuration: what cannot work is named before Ray starts or verl is imported."""

import ast
import importlib.util
import json
import netrc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cppo_verl import retention
from cppo_verl.adapters import compat
from cppo_verl.config import ConfigError, run_folder
from cppo_verl.methods import DIVERGENCES


class Absent(str):
    """A problem that is none on a machine which has the file."""


def validate(config: DictConfig, planned: bool = False) -> list[str]:
    """Raise ConfigError listing every problem found. Imports torch (to build the method), never verl or Ray.

    Args:
        planned: the run is for another machine; files that are absent here are returned instead.
    """
    problems: list[str] = []
    for check in _CHECKS:
        try:
            problems += check(config)
        except (OmegaConfBaseException, TypeError) as error:  # a value of a type that cannot be compared, e.g. null
            problems.append(f"a setting has a value of the wrong type: {str(error).splitlines()[0]}")
    problems = list(dict.fromkeys(problems))
    absent: list[str] = [problem for problem in problems if planned and isinstance(problem, Absent)]
    if len(problems) > len(absent):
        raise ConfigError("\n".join(problem for problem in problems if problem not in absent))
    return absent


def _check_method(config: DictConfig) -> Iterator[str]:
    settings = {name: value for name, value in config.method.items() if name != "_target_"}
    target = config.method.get("_target_")
    try:
        method = get_class(str(target))
    except Exception as error:  # of the module, which may be anybody's
        yield f"method._target_={target} cannot be imported: {str(error).splitlines()[0]}"
        return
    if not is_dataclass(method):
        yield f"method._target_={target} is not a dataclass of settings (docs/adding_a_method.md)"
        return
    try:
        schema = OmegaConf.structured(method)
        OmegaConf.set_readonly(schema, False)
        OmegaConf.to_object(OmegaConf.merge(schema, settings))
    except OmegaConfBaseException as error:  # a value of the wrong type
        yield f"method.{error.full_key}: {str(error).splitlines()[0]}"
    except ValueError as error:  # the method's own check
        yield str(error)
    if config.method.get("allow_tv") is False and config.divergence.kind != "kl":
        yield (
            f"divergence={config.divergence.name}: {config.method.name} is defined on a KL divergence; "
            "use divergence=topk_kl, or method.allow_tv=true to go on with its KL thresholds on a total variation"
        )


def _check_divergence(config: DictConfig) -> Iterator[str]:
    """Whether the Top-K log-probabilities can be had: from vLLM, and in the actor from verl's logits hook."""
    name, k = config.divergence.name, config.divergence.k
    if name not in DIVERGENCES:
        yield f"divergence.name={name}: choose one of {', '.join(DIVERGENCES)} by divergence="
        return
    over_topk = DIVERGENCES[name].over_topk
    if not isinstance(k, int) or (k < 1 if over_topk else k != 0):
        yield f"divergence.k={k}: {name} needs " + ("a number of tokens, 1 or more" if over_topk else "k=0")
        return
    if not over_topk:
        return
    if config.divergence.log_prob_dtype not in ("float32", "float16"):
        yield f"divergence.log_prob_dtype={config.divergence.log_prob_dtype}: use float32 or float16"
    instead = "or choose divergence=binary_tv, which does not look at the logits"
    actor, model, rollout = (config.actor_rollout_ref[part] for part in ("actor", "model", "rollout"))
    vocabulary = _vocabulary_size(model.path)
    if vocabulary is not None and k > vocabulary:
        yield f"divergence.k={k}: the vocabulary of actor_rollout_ref.model.path has only {vocabulary} tokens"
    if model.use_fused_kernels:
        yield (
            "actor_rollout_ref.model.use_fused_kernels=true: fused kernels never form the logits that "
            f"divergence={name} reads; set false, {instead}"
        )
    engine = actor.megatron if actor.strategy == "megatron" else actor.fsdp_config
    if actor.get("pad_to_length", False) or engine.get("pad_to_length", False):
        yield f"pad_to_length=true: verl's engine refuses it where the loss reads the logits; set false, {instead}"
    if actor.strategy not in ("fsdp", "fsdp2", "megatron"):
        yield f"actor_rollout_ref.actor.strategy={actor.strategy}: use fsdp2, fsdp or megatron, {instead}"
    if actor.strategy == "megatron" and engine.get("dynamic_context_parallel", False):
        yield f"actor_rollout_ref.actor.megatron.dynamic_context_parallel=true: set false, {instead}"
    if actor.strategy == "megatron" and (engine.get("override_transformer_config") or {}).get("fp8"):
        yield f"actor_rollout_ref.actor.megatron.override_transformer_config.fp8: switch it off, {instead}"
    if rollout.get("disaggregation", {}).get("enabled", False):
        yield f"actor_rollout_ref.rollout.disaggregation.enabled=true: set false, {instead}"
    limit = rollout.engine_kwargs.vllm.get("max_logprobs")
    if limit != -1 and (20 if limit is None else limit) < k:  # 20: vLLM's own default
        yield (
            f"actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs={limit} is less than divergence.k={k}; "
            "leave it alone, it follows divergence.k"
        )


def _vocabulary_size(path: str | None) -> int | None:
    """Of a local model folder; None where it cannot be told before loading."""
    file = Path(path).expanduser() / "config.json" if path else None
    if file is None or not file.is_file():
        return None
    try:
        size = json.loads(file.read_text()).get("vocab_size")
    except (OSError, ValueError):
        return None
    return size if isinstance(size, int) else None


def _check_verl_mode(config: DictConfig) -> Iterator[str]:
    actor = config.actor_rollout_ref.actor
    if not config.trainer.use_v1:
        yield "trainer.use_v1=false: verl's V0 trainer replaces the policy loss; only the V1 trainer is supported"
    if config.trainer.v1.trainer_mode != "sync":
        yield f"trainer.v1.trainer_mode={config.trainer.v1.trainer_mode}: only sync is supported"
    if not config.algorithm.rollout_correction.bypass_mode:
        yield (
            "algorithm.rollout_correction.bypass_mode=false: the trust region is anchored to the rollout's own "
            "log-probabilities; leave it true"
        )
    if config.algorithm.adv_estimator != "grpo":
        yield f"algorithm.adv_estimator={config.algorithm.adv_estimator}: advantages are group-relative; use grpo"
    if actor.policy_loss.get("_target_") != "cppo_verl.adapters.loss.TrustRegionConfig":
        yield "actor_rollout_ref.actor.policy_loss._target_ was changed; choose the loss by method= instead"
    if actor.get("grad_clip", 1.0) != 1.0:
        yield (
            "actor_rollout_ref.actor.grad_clip is not read by verl's engine; "
            "set actor_rollout_ref.actor.optim.clip_grad"
        )
    if config.get("distillation", {}).get("enabled", False):
        yield "distillation.enabled=true: verl's distillation replaces the policy loss; set false"
    if any(value is not None for value in config.custom_reward_function.values()):
        yield "custom_reward_function.* is ignored by verl 0.9.1; set reward.custom_reward_function.* instead"


def _check_rollout(config: DictConfig) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != "vllm":
        yield f"actor_rollout_ref.rollout.name={rollout.name}: only vllm is supported"
    if rollout.top_p < 1 or rollout.top_k > 0:
        yield (
            f"actor_rollout_ref.rollout.top_p={rollout.top_p}, top_k={rollout.top_k}: training samples must come from "
            "the whole softmax, or log mu is not the policy's; use top_p=1.0 top_k=-1 (validation: val_kwargs)"
        )
    if not rollout.calculate_log_probs:
        yield "actor_rollout_ref.rollout.calculate_log_probs=false: its log-probabilities are needed; set true"
    if rollout.logprobs_mode != "processed_logprobs":
        yield f"actor_rollout_ref.rollout.logprobs_mode={rollout.logprobs_mode}: must be processed_logprobs"
    if rollout.agent.default_agent_loop != "cppo_single_turn":
        yield (
            f"actor_rollout_ref.rollout.agent.default_agent_loop={rollout.agent.default_agent_loop}: only "
            "cppo_single_turn asks for what the trust region needs"
        )
    if _not_positive(rollout.n) or rollout.n is None or rollout.n < 2:
        yield f"actor_rollout_ref.rollout.n={rollout.n}: a group of one has no relative advantage; use 2 or more"


def _check_engine(config: DictConfig) -> Iterator[str]:
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    on_cpu = config.trainer.device == "cpu"
    if on_cpu and model.use_fused_kernels:
        yield "actor_rollout_ref.model.use_fused_kernels=true: fused kernels need a GPU; set false"
    if actor.get("pad_to_length", False) and not model.use_remove_padding:
        yield "actor_rollout_ref.actor.pad_to_length=true pads packed sequences; it needs model.use_remove_padding=true"
    if on_cpu and actor.strategy != "fsdp2":
        yield f"actor_rollout_ref.actor.strategy={actor.strategy}: on the CPU only fsdp2 runs"
    sizes = {
        "data.train_batch_size": config.data.train_batch_size,
        "actor_rollout_ref.actor.ppo_mini_batch_size": actor.ppo_mini_batch_size,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": actor.ppo_micro_batch_size_per_gpu,
    }
    optional = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    wrong = [
        f"{name} must be a positive number; got {size}"
        for name, size in sizes.items()
        if _not_positive(size) or (size is None and name != optional)
    ]
    if wrong:
        yield from wrong
        return
    if config.data.train_batch_size % actor.ppo_mini_batch_size:
        yield (
            f"data.train_batch_size={config.data.train_batch_size} must be a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} (both count prompts)"
        )
    yield from _check_micro_batch(config)


def _not_positive(size: Any) -> bool:
    return size is not None and (not isinstance(size, int) or size < 1)


def _check_micro_batch(config: DictConfig) -> Iterator[str]:
    """verl splits a rank's share of a minibatch into equal micro-batches, or fails in the first update."""
    actor = config.actor_rollout_ref.actor
    micro = actor.ppo_micro_batch_size_per_gpu
    if actor.use_dynamic_bsz:
        return
    if micro is None:
        yield (
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu is not set (responses per forward pass); "
            "give a number, or actor_rollout_ref.actor.use_dynamic_bsz=true"
        )
        return
    responses = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    devices, split = config.trainer.nnodes * config.trainer.n_gpus_per_node, _model_parallel_size(config)
    ranks = devices // split
    if ranks < 1:
        yield (
            f"trainer.nnodes x trainer.n_gpus_per_node = {devices} is less than one copy of the model takes ({split}: "
            "tensor, pipeline, context and sequence parallelism)"
        )
    elif responses % (ranks * micro):
        yield (
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} must divide the {responses} responses of a "
            f"minibatch (ppo_mini_batch_size x rollout.n) spread over {ranks} data-parallel ranks"
        )


def _model_parallel_size(config: DictConfig) -> int:
    actor = config.actor_rollout_ref.actor
    if actor.strategy == "megatron":
        split = actor.megatron
        return int(split.tensor_model_parallel_size * split.pipeline_model_parallel_size * split.context_parallel_size)
    return int(max(actor.get("ulysses_sequence_parallel_size", 1), actor.fsdp_config.ulysses_sequence_parallel_size))


def _check_model(config: DictConfig) -> Iterator[str]:
    model = config.actor_rollout_ref.model
    if model.path is None:
        yield "actor_rollout_ref.model.path is not set: give a Hugging Face folder or hub id"
        return
    path = Path(model.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            yield f"actor_rollout_ref.model.path={model.path} has no config.json: not a Hugging Face model folder"
    elif path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") != 1:
        yield Absent(f"actor_rollout_ref.model.path={model.path} does not exist")
    elif os.environ.get("HF_HUB_OFFLINE") == "1" and not _in_hub_cache(model.path):
        yield Absent(f"actor_rollout_ref.model.path={model.path} is not in the local hub cache, and HF_HUB_OFFLINE=1")


def _in_hub_cache(repository: str) -> bool:
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")), "hub"
    )
    return Path(cache, f"models--{repository.replace('/', '--')}").is_dir()


def _check_data(config: DictConfig) -> Iterator[str]:
    for key, needed in (("train_files", config.data.train_batch_size), ("val_files", 1)):
        if config.data[key] is None:
            yield f"data.{key} is not set: give a parquet file or a list of them"
            continue
        files = config.data[key]
        files = list(files) if isinstance(files, ListConfig) else [files]
        if not files:
            yield f"data.{key} is an empty list: give a parquet file or a list of them"
        rows = 0
        for file in files:
            if "://" in str(file):  # a remote file system, which verl reads itself
                rows = 1 << 60
                continue
            problem, count = inspect_data_file(Path(file), config.data.prompt_key)
            rows += count
            if problem:
                text = f"data.{key}: {file} {problem}"
                yield text if Path(file).exists() else Absent(f"{text}; cppo prepare makes data files")
        if rows and isinstance(needed, int) and rows < needed:
            yield f"data.{key} holds {rows} problems, fewer than one batch (data.train_batch_size={needed})"


def inspect_data_file(path: Path, prompt_key: str) -> tuple[str | None, int]:
    """(what is wrong or None, number of rows) of one verl data file; only parquet is looked into."""
    if not path.is_file():
        return "does not exist", 0
    if path.suffix != ".parquet":
        return None, 1 << 60  # verl reads json too; its own loader reports what is wrong there
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        columns = set(file.schema_arrow.names)
        missing = {prompt_key, "data_source", "reward_model"} - columns
        if missing:
            return f"lacks the column {', '.join(sorted(missing))} (it has {', '.join(sorted(columns))})", 0
        if "agent_name" in columns:
            return "has a column agent_name, which would replace our agent loop; leave it out", 0
        count = file.metadata.num_rows
        if not count:
            return "is empty", 0
        first = next(file.iter_batches(batch_size=1)).to_pylist()[0]
    except (pyarrow.ArrowException, OSError) as error:
        return f"is not a readable parquet file: {error}", 0
    if not isinstance(first[prompt_key], list) or "content" not in (first[prompt_key][0] or {}):
        return f"has a {prompt_key} that is not a list of chat messages with role and content", 0
    if "ground_truth" not in (first["reward_model"] or {}):
        return "has a reward_model without ground_truth", 0
    return None, count


def _check_reward(config: DictConfig) -> Iterator[str]:
    key, path = "reward.custom_reward_function", config.reward.custom_reward_function.path
    if path is None:
        yield f"{key}.path is not set: give a file with a reward function, or leave it at pkg://cppo_verl.grading"
    elif path.startswith("pkg://"):
        module = path.removeprefix("pkg://").replace("/", ".")
        if not _importable(module):
            yield f"{key}.path={path}: there is no module {module}"
    elif not Path(path.removeprefix("file://")).is_file():
        yield f"{key}.path={path} does not exist"
    else:
        yield from _check_reward_file(Path(path.removeprefix("file://")), config.reward.custom_reward_function.name)
    overlong, longest = config.reward.reward_kwargs.overlong_buffer_cfg, config.data.max_response_length
    if overlong.enable and not 0 < overlong.len <= longest:
        yield (
            f"reward.reward_kwargs.overlong_buffer_cfg.len={overlong.len} must be between 1 and "
            f"data.max_response_length={longest}"
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _check_reward_file(path: Path, name: str) -> Iterator[str]:
    """Read, not run: the function may need what only the reward workers have."""
    try:
        text = path.read_text()
        ast.parse(text, str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        yield f"reward.custom_reward_function.path={path} is not Python: {error}"
        return
    if not re.search(rf"\b{re.escape(name)}\b", text):
        yield f"reward.custom_reward_function.name={name}: {path} does not define it"


def _check_run(config: DictConfig) -> Iterator[str]:
    name, folder = str(config.run.name), run_folder(config)
    if "/" in name or name in ("", ".", ".."):
        yield f"run.name={name}: a plain folder name is needed"
    elif config.run.resume not in (True, False):
        yield f"run.resume={config.run.resume}: use true, false or auto"
    elif not config.run.resume and _holds_a_run(folder):
        yield f"run.name={name} is in use ({folder}): choose another name, or continue it with run.resume=true"
    elif config.run.resume and not (folder / "config.yaml").exists():
        yield f"run.resume=true, but there is no run {folder}: give the run.name (and run.dir) of the run to continue"
    elif config.run.resume:
        yield from _changed_since(folder / "config.yaml", config)


def _holds_a_run(folder: Path) -> bool:
    """Not where its very first file could not be written."""
    if not folder.exists():
        return False
    return any(path.name not in (".lock", "logs") and path.suffix != ".tmp" for path in folder.iterdir())


def _check_checkpoints(config: DictConfig) -> Iterator[str]:
    keep, trainer = config.trainer.max_actor_ckpt_to_keep, config.trainer
    if keep is not None and _not_positive(keep):
        yield f"trainer.max_actor_ckpt_to_keep={keep}: give the number of newest checkpoints to keep, or null for all"
    if trainer.get("remove_previous_ckpt_in_save", False):
        yield "trainer.remove_previous_ckpt_in_save=true: use trainer.max_actor_ckpt_to_keep=1 instead"
    for key in ("save_freq", "test_freq"):
        if not isinstance(trainer[key], int):
            yield f"trainer.{key}={trainer[key]}: give a number of steps, or -1 for never"
    parts = ("model", "optimizer", "extra")
    for key in ("save_contents", "load_contents"):
        contents = config.actor_rollout_ref.actor.checkpoint[key]
        if lacking := [part for part in parts if part not in (contents or ())]:
            yield (
                f"actor_rollout_ref.actor.checkpoint.{key} lacks {', '.join(lacking)}: a resumed run would go on "
                "with a fresh one, without a word; keep model, optimizer and extra"
            )
    if trainer.resume_mode == "resume_path":
        yield from _check_resume_path(config)
    if config.actor_rollout_ref.actor.checkpoint.get("async_save", False):
        yield (
            "actor_rollout_ref.actor.checkpoint.async_save=true: when such a checkpoint is complete cannot be told, "
            "and a run resumes from complete ones only; set false"
        )


def _check_resume_path(config: DictConfig) -> Iterator[str]:
    path, own = config.trainer.resume_from_path, config.trainer.default_local_dir
    if path is None:
        yield "trainer.resume_from_path is not set: give a global_step_N folder, or leave trainer.resume_mode alone"
    elif "://" not in path and not Path(path).is_dir():
        yield Absent(f"trainer.resume_from_path={path} does not exist")
    elif not (found := re.fullmatch(r"global_step_(\d+)", Path(path).name)):
        yield f"trainer.resume_from_path={path}: give one of verl's global_step_N folders"
    elif Path(path).parent == Path(own) and (
        later := [step for step in retention.complete_steps(own) if step > int(found[1])]
    ):  # the next resume would take the newest, of what was given up
        yield (
            f"trainer.resume_from_path={path}: this run has later checkpoints ({', '.join(map(str, later))}); "
            "move them away, or go on from this one in a run of another run.name"
        )


def _check_logger(config: DictConfig) -> Iterator[str]:
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else list(loggers or ())
    if "file" in loggers:
        yield "trainer.logger=file: every resume empties verl's file; the run folder's metrics.jsonl has the same names"
    if "wandb" in loggers and not wandb_can_start():
        yield (
            "trainer.logger has wandb, but there is no login: run wandb login, or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline (wandb sync uploads the run folder's wandb/ later)"
        )


def wandb_can_start() -> bool:
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _changed_since(stored_file: Path, config: DictConfig) -> Iterator[str]:
    """What makes a run another experiment must be the same when it goes on."""
    stored = OmegaConf.load(stored_file)
    for key in ("method", "divergence", "run.seed", "actor_rollout_ref.model.path", "data.train_batch_size"):
        before, now = OmegaConf.select(stored, key), OmegaConf.select(config, key)
        if isinstance(now, DictConfig):
            now = OmegaConf.create(OmegaConf.to_container(now, resolve=True))
        if before != now:
            yield f"run.resume=true: {key} was {before} in this run and is {now} now; repeat the run's own settings"


def _check_versions(config: DictConfig) -> Iterator[str]:
    try:
        compat.check_verl_version()
    except compat.IncompatibleError as error:
        yield str(error)


_CHECKS: tuple[Callable[[DictConfig], Iterator[str]], ...] = (
    _check_versions,
    _check_method,
    _check_divergence,
    _check_verl_mode,
    _check_rollout,
    _check_engine,
    _check_model,
    _check_data,
    _check_reward,
    _check_run,
    _check_checkpoints,
    _check_logger,
)
