"""What an evaluation is of: the options, what they leave to the checkpoint's run, and all that decides the samples."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from cppo_verl.adapters.columns import TOOL_LOOP
from cppo_verl.checkpoint.export import fingerprint
from cppo_verl.checkpoint.find import Checkpoint
from cppo_verl.config.compose import compose
from cppo_verl.data.sources import AIME
from cppo_verl.evaluation.samples import QUESTIONS, Evaluation, EvaluationError, Question, content_hashes
from cppo_verl.run.files import DamagedFile, read_json, write_atomically, write_lines
from cppo_verl.run.folder import CONFIG, COPY_BACK, MANIFEST, read_config
from cppo_verl.run.machine import ONE_PROCESS, has_gpu

# What is read of a run's configuration.
_READ = ("data", "reward.custom_reward_function", "actor_rollout_ref.model", "actor_rollout_ref.rollout.val_kwargs")


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None: as the checkpoint's run has it (without a run: as configs/train.yaml)."""

    data: list[Path] | None = None
    """verl parquet files. Default: the run's data.val_files, else data/aime24, aime25 and aime26.parquet."""
    n: int | None = None
    """Samples per question (rollout.val_kwargs.n)."""
    temperature: float | None = None
    """rollout.val_kwargs.temperature."""
    top_p: float | None = None
    """rollout.val_kwargs.top_p."""
    max_tokens: int | None = None
    """Longest response (data.max_response_length)."""
    thinking: bool | None = None
    """enable_thinking of the chat template (data.apply_chat_template_kwargs)."""
    seed: int = 0
    """Another one samples afresh."""
    limit: int | None = None
    """Only the first questions of each benchmark."""
    tensor_parallel: int | None = None
    """GPUs of one copy of the model (rollout.tensor_model_parallel_size)."""
    out: Path | None = None
    """Folder of the evaluation. Default: RUN/eval/step_N-seedS, else evals/NAME-seedS."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    trust: bool = False
    """Run code that comes with a checkpoint of somebody else's."""


def run_config(checkpoint: Checkpoint) -> DictConfig:
    """How the checkpoint's run was validated; our defaults for a model that belongs to no run.

    Raises:
        EvaluationError: its responses have several turns, with tools.
        DamagedFile: its settings lack what is needed.
    """
    if checkpoint.run is None:
        return compose([])
    config = read_config(checkpoint.run)
    for name in _READ:
        if not isinstance(OmegaConf.select(config, name), DictConfig):
            raise DamagedFile(checkpoint.run / CONFIG, 1, f"lacks {name}", COPY_BACK)
    if OmegaConf.select(config, "actor_rollout_ref.rollout.agent.default_agent_loop") == TOOL_LOOP:
        raise EvaluationError(
            f"{checkpoint.run} was trained with tools, and an evaluation generates one turn without them; the run's "
            "own validations use them (trainer.test_freq; of a checkpoint: cppo train with run.resume=true "
            "trainer.val_only=true)"
        )
    return config


def data_files(options: Options, config: DictConfig) -> list[Path]:
    if options.data:
        return options.data
    files = config.data.val_files
    if files is not None:
        return [Path(file) for file in (files if isinstance(files, ListConfig) else [files])]
    prepared = [Path("data") / f"{name}.parquet" for name in AIME]
    missing = [str(path) for path in prepared if not path.is_file()]
    if missing:
        raise EvaluationError(
            f"no --data, and {', '.join(missing)} not found: run cppo prepare, or give --data FILE ..."
        )
    return prepared


def folder_of(checkpoint: Checkpoint, options: Options) -> Path:
    if options.out:
        return Path(os.path.expanduser(options.out)).absolute()
    root = checkpoint.run / "eval" if checkpoint.run else Path("evals").absolute()
    return root / f"{checkpoint.name}-seed{options.seed}"


def sampling_settings(
    checkpoint: Checkpoint, model: Path, questions: list[Question], options: Options, config: DictConfig
) -> dict[str, Any]:
    """Everything that decides the samples; an evaluation goes on only where all of it is the same."""
    rollout, validation = config.actor_rollout_ref.rollout, config.actor_rollout_ref.rollout.val_kwargs
    function = config.reward.custom_reward_function
    arguments: Any = config.data.get("apply_chat_template_kwargs") or {}
    arguments = OmegaConf.to_container(arguments) if isinstance(arguments, DictConfig) else dict(arguments)
    if options.thinking is not None:
        arguments["enable_thinking"] = options.thinking
    decoding = {
        "n": options.n or validation.n,
        "temperature": validation.temperature if options.temperature is None else options.temperature,
        "top_p": validation.top_p if options.top_p is None else options.top_p,
        "top_k": validation.top_k,
        "max_tokens": options.max_tokens or config.data.max_response_length,
        "seed": options.seed,
        "dtype": rollout.dtype,
    }
    if decoding["temperature"] == 0 and decoding["n"] > 1:
        raise EvaluationError("--temperature 0 gives the same response n times; use -n 1")
    return {
        "model": {"source": checkpoint.source, "name": checkpoint.name, "sha256": fingerprint(model)},
        "questions": content_hashes(questions),
        "decoding": decoding,
        "chat": {"arguments": arguments, "template_sha256": _template_hash(model, config)},
        "reward": {
            "path": function.path,
            "name": function.name,
            "kwargs": OmegaConf.to_container(function.get("reward_kwargs") or OmegaConf.create()),
            "sha256": _file_hash(function.path),
        },
    }


def _file_hash(path: str) -> str | None:
    """Of a reward function's file: edited, it is another grader. None for a module."""
    if path.startswith("pkg://"):
        return None
    file = Path(path.removeprefix("file://"))
    if not file.is_file():
        raise EvaluationError(f"the run's reward function {file} is not there (reward.custom_reward_function.path)")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _template_hash(model: Path, config: DictConfig) -> str:
    from transformers import AutoTokenizer

    remote_code = bool(config.actor_rollout_ref.model.get("trust_remote_code", False))
    try:
        template = AutoTokenizer.from_pretrained(model, trust_remote_code=remote_code).chat_template
    except Exception as error:  # of whatever kind a damaged file leads to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EvaluationError(f"{model}: its tokenizer cannot be loaded ({reason}); copy the model again") from None
    if not template:
        raise EvaluationError(f"{model} has no chat template, which turns a problem into a prompt")
    return hashlib.sha256(str(template).encode()).hexdigest()


def engine_arguments(model: Path, parallel: int, config: DictConfig) -> dict[str, Any]:
    """vLLM's arguments, which decide speed only, but for dtype."""
    rollout = config.actor_rollout_ref.rollout
    on_cpu = not has_gpu() and "RAY_ADDRESS" not in os.environ
    return {
        "model": str(model),
        "dtype": rollout.dtype,
        "tensor_parallel_size": 1 if on_cpu else parallel,
        "distributed_executor_backend": ONE_PROCESS if on_cpu else None,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": on_cpu,
        # On CPUs vLLM cannot hand a seeded request the random state back that it drew in an unfinished prefill.
        "enable_chunked_prefill": not on_cpu,
        "enable_prefix_caching": True,
        "trust_remote_code": bool(config.actor_rollout_ref.model.get("trust_remote_code", False)),
        "seed": 0,
        "gpus_per_replica": 0 if on_cpu else parallel,
    }


def check_length(model: Path, max_tokens: int) -> None:
    config = read_json(model / "config.json", "copy the model again")
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and not config.get("rope_scaling") and max_tokens >= limit:
        raise EvaluationError(
            f"--max-tokens {max_tokens} leaves no room for a prompt: the model has {limit} positions "
            "(max_position_embeddings); give a smaller one"
        )


def open_evaluation(folder: Path, settings: dict[str, Any], questions: list[Question]) -> Evaluation:
    """A new evaluation, or the one in ``folder`` to go on with.

    Raises:
        EvaluationError: ``folder`` holds an evaluation of something else.
    """
    if (folder / MANIFEST).exists():
        known = Evaluation.read(folder)
        before = known.manifest["settings"]
        changed = [name for name in settings if _identity(name, settings) != _identity(name, before)]
        if changed:
            details = "; ".join(f"{name}: {_difference(before.get(name), settings[name])}" for name in changed)
            raise EvaluationError(f"{folder} holds an evaluation with other settings ({details}): give another --out")
        return known
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / QUESTIONS, map(asdict, questions))
    write_manifest(folder, {"folder": str(folder), "settings": settings, "attempts": []})
    return Evaluation.read(folder)


def _identity(name: str, settings: dict[str, Any]) -> Any:
    """A setting as far as it decides the samples: a model is its content, wherever it lies."""
    return settings["model"]["sha256"] if name == "model" else settings.get(name)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    write_atomically(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys)
    return f"was {old}, is {new}"
