"""`cppo eval`, `cppo report` and `cppo compare`: from a checkpoint to samples, and from samples to a report."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from cppo_verl.checkpoints import Checkpoint, checkpoints_of, find, fingerprint, hugging_face_folder
from cppo_verl.config import compose, has_gpu
from cppo_verl.data.sources import AIME
from cppo_verl.display import SamplingDisplay
from cppo_verl.evaluation import summary
from cppo_verl.evaluation.samples import (
    MANIFEST,
    QUESTIONS,
    SAMPLES,
    Evaluation,
    EvaluationError,
    Question,
    read_questions,
    write_lines,
)
from cppo_verl.evaluation.summary import notes, rich_table, terminal_tables, write_report
from cppo_verl.launcher import INTERRUPTED, locked, process_environment, supervise
from cppo_verl.manifest import manifest

# A file or a pipe has no width: tables are printed whole.
_console = Console(highlight=False) if Console().is_terminal else Console(highlight=False, width=140)


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


def _say(text: str) -> None:
    _console.print(text, soft_wrap=True)


def evaluate(text: str, options: Options, command: list[str]) -> int:
    """``cppo eval CHECKPOINT``; returns the exit status."""
    return _evaluate(find(text, options.revision), options, command)


def evaluate_all(text: str, options: Options, command: list[str]) -> int:
    """``cppo eval RUN --all``: every checkpoint, then the best one again with fresh seeds.

    The best of several noisy scores is biased upward; the same checkpoint sampled afresh is not.
    """
    run = Path(text).expanduser().absolute()
    if options.out:
        raise EvaluationError("--out names the folder of one evaluation; with --all they stand in RUN/eval")
    rows: list[dict[str, Any]] = []
    for checkpoint in checkpoints_of(run, _say):
        status = _evaluate(checkpoint, options, command)
        if status:
            return status
        rows.append(_row(checkpoint, options))
    best = max(rows, key=lambda row: row["avg"])
    fresh = replace(options, seed=options.seed + 1)
    again = find(str(run / "checkpoints" / f"global_step_{best['step']}"))
    status = _evaluate(again, fresh, command)
    if status:
        return status
    window = {"rows": rows, "best": best, "best_resampled": _row(again, fresh), "last": rows[-1]}
    (run / "eval" / "all.json").write_text(json.dumps(window, indent=2) + "\n")
    _show_window(window)
    return 0


def _row(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    folder = _folder(checkpoint, options)
    report = json.loads((folder / "report.json").read_text())
    score = report["mean"] or next(iter(report["benchmarks"].values()))
    label = report["mean"]["label"] if report["mean"] else next(iter(report["benchmarks"]))
    keys = ("avg", "decoding_error", "interval")
    return {"step": checkpoint.step, "of": label, "folder": str(folder), **{key: score[key] for key in keys}}


def _show_window(window: dict[str, Any]) -> None:
    first, last = window["rows"][0]["step"], window["rows"][-1]["step"]
    named = [
        (f"best of {len(window['rows'])} checkpoints, steps {first} to {last} (biased upward)", window["best"]),
        ("the same checkpoint, fresh seeds", window["best_resampled"]),
        ("the last checkpoint", window["last"]),
    ]
    rows = ((name, str(row["step"]), f"{row['avg']:.1%}", _plus_minus(row)) for name, row in named)
    _console.print(rich_table((window["best"]["of"], "step", "Avg@k", "decoding error"), rows, _console.width))


def _plus_minus(row: dict[str, Any]) -> str:
    return "-" if row["decoding_error"] is None else f"± {100 * row['decoding_error']:.1f}"


def _evaluate(checkpoint: Checkpoint, options: Options, command: list[str]) -> int:
    config = _run_config(checkpoint)
    questions = read_questions(_data_files(options, config), options.limit)
    folder = _folder(checkpoint, options)
    with locked(folder) as free:
        if not free:
            return 2
        remote_code = bool(config.actor_rollout_ref.model.get("trust_remote_code", False))
        model = hugging_face_folder(checkpoint, _say, remote_code)
        settings = _settings(checkpoint, model, questions, options, config)
        # verl's default of two GPUs a copy is for training; a run has chosen its own.
        parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size if checkpoint.run else 1
        engine = _engine(model, options.tensor_parallel or parallel, config)
        _check_length(model, settings["decoding"]["max_tokens"])
        evaluation = _open(folder, settings, questions)
        if evaluation.missing():
            status = _sample(evaluation, {**manifest(command), "engine": engine})
            if status:
                return status
        return _report(folder)


def _run_config(checkpoint: Checkpoint) -> DictConfig:
    """How the checkpoint's run was validated; our defaults for a model that belongs to no run."""
    if checkpoint.run is None:
        return compose([])
    loaded = OmegaConf.load(checkpoint.run / "config.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def _data_files(options: Options, config: DictConfig) -> list[Path]:
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


def _folder(checkpoint: Checkpoint, options: Options) -> Path:
    if options.out:
        return options.out.expanduser().absolute()
    root = checkpoint.run / "eval" if checkpoint.run else Path("evals").absolute()
    return root / f"{checkpoint.name}-seed{options.seed}"


def _settings(
    checkpoint: Checkpoint, model: Path, questions: list[Question], options: Options, config: DictConfig
) -> dict[str, Any]:
    """Everything that decides the samples; an evaluation goes on only where all of it is the same."""
    rollout, validation = config.actor_rollout_ref.rollout, config.actor_rollout_ref.rollout.val_kwargs
    function = config.reward.custom_reward_function
    arguments = config.data.get("apply_chat_template_kwargs") or {}
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
        "questions": _content_hashes(questions),
        "decoding": decoding,
        "chat": {"arguments": arguments, "template_sha256": _template_hash(model, config)},
        "reward": {
            "path": function.path,
            "name": function.name,
            "kwargs": OmegaConf.to_container(function.get("reward_kwargs") or OmegaConf.create()),
            "sha256": _file_hash(function.path),
        },
    }


def _content_hashes(questions: list[Question]) -> dict[str, str]:
    """benchmark -> SHA-256 of its questions."""
    digests: dict[str, Any] = {}
    for question in questions:
        line = json.dumps(asdict(question), sort_keys=True) + "\n"
        digests.setdefault(question.benchmark, hashlib.sha256()).update(line.encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


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
    template = AutoTokenizer.from_pretrained(model, trust_remote_code=remote_code).chat_template
    if not template:
        raise EvaluationError(f"{model} has no chat template, which turns a problem into a prompt")
    return hashlib.sha256(str(template).encode()).hexdigest()


def _engine(model: Path, parallel: int, config: DictConfig) -> dict[str, Any]:
    """vLLM's arguments, which decide speed only, but for dtype."""
    rollout = config.actor_rollout_ref.rollout
    on_cpu = not has_gpu() and "RAY_ADDRESS" not in os.environ
    return {
        "model": str(model),
        "dtype": rollout.dtype,
        "tensor_parallel_size": 1 if on_cpu else parallel,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": on_cpu,
        # On CPUs vLLM cannot hand a seeded request the random state back that it drew in an unfinished prefill.
        "enable_chunked_prefill": not on_cpu,
        "enable_prefix_caching": True,
        "trust_remote_code": bool(config.actor_rollout_ref.model.get("trust_remote_code", False)),
        "seed": 0,
        "gpus_per_replica": 0 if on_cpu else parallel,
    }


def _check_length(model: Path, max_tokens: int) -> None:
    config = json.loads((model / "config.json").read_text())
    limit = config.get("max_position_embeddings")
    if limit is not None and not config.get("rope_scaling") and max_tokens >= limit:
        raise EvaluationError(
            f"--max-tokens {max_tokens} leaves no room for a prompt: the model has {limit} positions "
            "(max_position_embeddings); give a smaller one"
        )


def _open(folder: Path, settings: dict[str, Any], questions: list[Question]) -> Evaluation:
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
    _write_manifest(folder, {"settings": settings, "attempts": []})
    return Evaluation.read(folder)


def _identity(name: str, settings: dict[str, Any]) -> Any:
    """A setting as far as it decides the samples: a model is its content, wherever it lies."""
    return settings["model"]["sha256"] if name == "model" else settings.get(name)


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(folder / MANIFEST)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys)
    return f"was {old}, is {new}"


def _sample(evaluation: Evaluation, attempt: dict[str, Any]) -> int:
    """Make the missing samples in a process of their own; returns its exit status."""
    folder, engine = evaluation.folder, attempt["engine"]
    evaluation.manifest["attempts"].append(attempt)
    _write_manifest(folder, evaluation.manifest)
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "events.jsonl").unlink(missing_ok=True)
    log_file = folder / "logs" / f"eval-{len(evaluation.manifest['attempts'])}.log"
    display = SamplingDisplay(evaluation, log_file, _console)
    environment = process_environment(not engine["gpus_per_replica"], engine["model"])
    environment["CPPO_RUN_FOLDER"] = str(folder)
    module = "cppo_verl.adapters.generation"
    status = supervise(module, folder, log_file, environment, folder / SAMPLES, display)
    if status and status != INTERRUPTED:
        display.failure.show(_console, "the evaluation", status)
    if status:
        _console.print("what was sampled is kept; the same command goes on from there")
    return status


def report(folder: Path, regrade: bool = False) -> int:
    """``cppo report EVALUATION``: recompute, write and print every number from the kept samples."""
    if regrade:
        from cppo_verl.adapters.generation import reward_function

        evaluation = Evaluation.read(folder)
        with locked(folder) as free:  # a running evaluation appends to the file that this replaces
            if not free:
                return 2
            changed = evaluation.regrade(reward_function(evaluation.manifest["settings"]["reward"]))
        _console.print(f"graded {len(evaluation.samples)} samples again; {changed} outcomes changed")
    return _report(folder)


def _report(folder: Path) -> int:
    numbers = write_report(Evaluation.read(folder))
    for table in terminal_tables(numbers, _console.width):
        _console.print()
        _console.print(table)
    _console.print()
    for note in notes(numbers):
        _console.print(note, soft_wrap=True)
    _console.print(f"report      {folder / 'report.md'}, report.json", soft_wrap=True)
    return 0


def compare(first: Path, second: Path, out: Path | None = None) -> int:
    """``cppo compare A B``: paired differences over the questions of two evaluations."""
    result = summary.compare(Evaluation.read(first), Evaluation.read(second))
    _console.print(f"A  {first}\nB  {second}\n", soft_wrap=True)
    _console.print(summary.comparison_table(result, _console.width))
    _console.print("\ndifferences in percentage points, paired by question; p: sign-flip test, two-sided")
    for name, (a, b) in result["settings"].items():
        _console.print(f"note: {name} differs (A {a}, B {b}); the scores may differ because of it", soft_wrap=True)
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")
    return 0
