"""`cppo eval`, `cppo report` and `cppo compare`: from a checkpoint to samples, and from samples to a report."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cppo_verl.checkpoint.export import hugging_face_folder
from cppo_verl.checkpoint.find import Checkpoint, checkpoints_of, find
from cppo_verl.checkpoint.trust import OWN_REWARD, check_trust
from cppo_verl.evaluation import comparison
from cppo_verl.evaluation.display import SamplingDisplay
from cppo_verl.evaluation.report import notes, rich_table, terminal_tables, write_report
from cppo_verl.evaluation.request import (
    Options,
    check_length,
    data_files,
    engine_arguments,
    folder_of,
    open_evaluation,
    run_config,
    sampling_settings,
    write_manifest,
)
from cppo_verl.evaluation.samples import SAMPLES, Evaluation, EvaluationError, read_questions
from cppo_verl.run.files import read_json, write_atomically
from cppo_verl.run.folder import foreign
from cppo_verl.run.log import EVENTS
from cppo_verl.run.manifest import manifest
from cppo_verl.run.supervisor import INTERRUPTED, RUN_FOLDER, locked, process_environment, supervise
from cppo_verl.run.terminal import console

# Said where an evaluation ends before its end.
_KEPT = "what was sampled is kept; the same command goes on from there"
# A file or a pipe has no width: tables are printed whole.
_console = console() if console().is_terminal else console(width=140)


def _say(text: str) -> None:
    _console.print(text, soft_wrap=True)


def evaluate(checkpoint: str, every: bool, **chosen: Any) -> int:
    """``cppo eval CHECKPOINT``, with ``every`` its ``--all``; returns the exit status.

    Args:
        chosen: fields of :class:`Options`.
    """
    options, command = Options(**chosen), ["cppo", *sys.argv[1:]]
    if every:
        return _evaluate_all(checkpoint, options, command)
    return _evaluate(find(checkpoint, options.revision), options, command)


def _evaluate_all(text: str, options: Options, command: list[str]) -> int:
    """Every checkpoint of a run, then the best one again with fresh seeds.

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
    write_atomically(run / "eval" / "all.json", json.dumps(window, indent=2) + "\n")
    _show_window(window)
    return 0


def _row(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    folder = folder_of(checkpoint, options)
    report = read_json(folder / "report.json", f"cppo report {folder} writes it again", "mean", "benchmarks")
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
    config = run_config(checkpoint)
    check_trust(checkpoint, config, options.trust)
    questions = read_questions(data_files(options, config), options.limit)
    folder = folder_of(checkpoint, options)
    with locked(folder) as free:
        if not free:
            return 2
        remote_code = bool(config.actor_rollout_ref.model.get("trust_remote_code", False))
        model = hugging_face_folder(checkpoint, _say, remote_code)
        settings = sampling_settings(checkpoint, model, questions, options, config)
        # verl's default of two GPUs a copy is for training; a run has chosen its own.
        parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size if checkpoint.run else 1
        engine = engine_arguments(model, options.tensor_parallel or parallel, config)
        check_length(model, settings["decoding"]["max_tokens"])
        evaluation = open_evaluation(folder, settings, questions)
        if evaluation.missing():
            minutes = OmegaConf.select(config, "run.stall_minutes")
            stall = None if minutes is None else 60 * minutes
            status = _sample(evaluation, {**manifest(command), "engine": engine}, stall)
            if status:
                return status
        return _report(folder)


def _sample(evaluation: Evaluation, attempt: dict[str, Any], stall: float | None) -> int:
    """Make the missing samples in a process of their own; returns its exit status.

    Args:
        stall: seconds without progress that end it (the run's ``run.stall_minutes``); None: it may take its time.
    """
    folder, engine = evaluation.folder, attempt["engine"]
    evaluation.manifest["attempts"].append(attempt)
    write_manifest(folder, evaluation.manifest)
    (folder / "logs").mkdir(exist_ok=True)
    (folder / EVENTS).unlink(missing_ok=True)
    log_file = folder / "logs" / f"eval-{len(evaluation.manifest['attempts'])}.log"
    display = SamplingDisplay(evaluation, log_file, _console)
    environment = process_environment(not engine["gpus_per_replica"], engine["model"])
    environment[RUN_FOLDER] = str(folder)
    module = "cppo_verl.evaluation.generation"
    status = supervise(module, folder, log_file, environment, folder / SAMPLES, display, stall, kept=_KEPT)
    if status and status != INTERRUPTED:
        display.failure.show(_console, "the evaluation", status)
    if status:
        _console.print(_KEPT)
    return status


def report(evaluation: Path, regrade: bool, trust: bool) -> int:
    """``cppo report EVALUATION``: recompute, write and print every number from the kept samples."""
    if regrade:
        known = Evaluation.read(evaluation)
        _check_reward(known, trust)
        from cppo_verl.evaluation.generation import reward_function

        with locked(evaluation) as free:  # a running evaluation appends to the file that this replaces
            if not free:
                return 2
            changed = known.regrade(reward_function(known.manifest["settings"]["reward"]))
        _console.print(f"graded {len(known.samples)} samples again; {changed} outcomes changed")
    return _report(evaluation)


def _check_reward(evaluation: Evaluation, trusted: bool) -> None:
    """Raise EvaluationError where grading again would run a function that somebody else's manifest names."""
    path = evaluation.manifest["settings"]["reward"]["path"]
    reason = foreign(evaluation.folder, evaluation.manifest.get("folder"))
    if reason and path != OWN_REWARD and not trusted:
        raise EvaluationError(
            f"--regrade: {evaluation.folder} {reason}, and grading runs the code that its manifest names ({path}); "
            "give --trust if you trust who made it"
        )


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


def compare(a: Path, b: Path, out: Path | None) -> int:
    """``cppo compare A B``: paired differences over the questions of two evaluations."""
    result = comparison.compare(Evaluation.read(a), Evaluation.read(b))
    _console.print(f"A  {a}\nB  {b}\n", soft_wrap=True)
    _console.print(comparison.table(result, _console.width))
    _console.print("\ndifferences in percentage points, paired by question; p: sign-flip test, two-sided")
    for name, (of_a, of_b) in result["settings"].items():
        _console.print(
            f"note: {name} differs (A {of_a}, B {of_b}); the scores may differ because of it", soft_wrap=True
        )
    if out:
        write_atomically(out, json.dumps(result, indent=2) + "\n")
    return 0
