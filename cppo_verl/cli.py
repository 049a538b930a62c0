"""The ``cppo`` command: parses, and calls the room that does it.

Nothing heavy is imported before the arguments are parsed, so that ``cppo --help`` is immediate.
"""

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from cppo_verl import __version__
from cppo_verl.bench.variants import OTHERS
from cppo_verl.problems import ConfigError
from cppo_verl.run.terminal import one_line, warn

# What a write or a new process fails with, without a file's name, whatever the program does right.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)

_TRAIN_HELP = """\
Every override is Hydra's: method=dppo, method.delta=0.2, divergence=binary_kl, trainer.total_training_steps=100 ...
Groups: method, divergence, mode, platform, recipe (files under configs/). Without platform= a GPU is used, if there
is one.
"""

_PREPARE_HELP = """\
SET is dapo, aime24, aime25, aime26 or math500 from the Hugging Face hub, or NAME=FILE (.jsonl or .parquet with
problem and answer columns), or NAME=HUB/REPOSITORY. Writes OUT/NAME.parquet for each and OUT/manifest.json.
"""

_EVAL_HELP = """\
CHECKPOINT is a Hugging Face folder or hub id, a run folder (its latest checkpoint), or one of its
checkpoints/global_step_N; verl's shards are merged when needed. Settings that are not given are those of the run's
validation; without a run those of configs/train.yaml. A killed evaluation goes on where it was when the same command
is given again.
"""

_MERGE_HELP = """\
CHECKPOINT is a run folder (its latest checkpoint), one of its checkpoints/global_step_N, or verl's folder of shards.
"""

_PLOT_HELP = """\
Runs that differ in their seed alone are one curve, their mean, with the range of the seeds as a band. Each figure is
written as PNG and SVG: validation, training, trust_region, ablations (of three and more settings), positions and mask
(of dumped steps: run.dump_steps, run.inspect_every).
"""

_TABLE_HELP = """\
Runs that differ in their seed alone are one row. A run is judged by cppo eval RUN --all where that was done, else by
its own validations.
"""

_DOCTOR_HELP = """\
Without overrides the machine and the installation are examined; with those of a run (recipe=..., data.train_files=...)
its settings, data, model and disk as well. Exit status: 0 when nothing FAILs, 1 otherwise, 2 for overrides that cannot
be composed.
"""

_TRUST = "run code that comes with what somebody else made (docs/operations.md)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status (2: a setting is wrong)."""
    parser = _parser()
    # argparse gives up on positionals that follow an option; recipes append "$@" after theirs.
    parsed, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in parsed):
        parser.error(one_line(f"unrecognized arguments: {' '.join(rest)}"))
    options = vars(parsed)
    if rest:
        options["overrides"] = [*options["overrides"], *rest]
    command, (module, function) = options.pop("command"), options.pop("action").split(":")
    try:
        status = getattr(import_module(f"cppo_verl.{module}"), function)(**options)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        for line in [problem.text for problem in error.problems] or str(error).split("\n"):
            warn(f"cppo {command}: {one_line(line)}")
    except BrokenPipeError:  # of a reader that has seen enough, e.g. head
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None and error.errno not in _OF_THE_MACHINE:
            raise
        where = "" if error.filename is None else f": {error.filename}"
        warn(one_line(f"cppo {command}: {error.strerror}{where}"))
    except KeyboardInterrupt:
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cppo", description="CPPO on verl: RLVR with a prefix-aware trust region.")
    parser.add_argument("--version", action="version", version=f"cppo_verl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action: str, text: str, more: str = "") -> argparse.ArgumentParser:
        """``action``: "module:function" inside cppo_verl; it is called with the parsed options."""
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=text, epilog=more, formatter_class=raw)
        command.set_defaults(action=action)
        return command

    train = add("train", "training.command:train", "train a model", _TRAIN_HELP)
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    train.add_argument("--dry-run", action="store_true", help="compose, check and print the configuration, then stop")
    prepare = "make verl's data files from the hub or from files"
    _add_prepare_arguments(add("prepare", "data.command:prepare_files", prepare, _PREPARE_HELP))
    evaluate = "sample a checkpoint and report Avg@k with its errors"
    _add_eval_arguments(add("eval", "evaluation.command:evaluate", evaluate, _EVAL_HELP))
    merge = add("merge", "checkpoint.command:merge", "make a Hugging Face folder with a model card of a checkpoint",
                _MERGE_HELP)  # fmt: skip
    merge.add_argument("checkpoint", metavar="CHECKPOINT")
    merge.add_argument("--out", type=Path, metavar="FOLDER", help="default: global_step_N/merged")
    merge.add_argument("--trust", action="store_true", help=_TRUST)
    report = add("report", "evaluation.command:report", "recompute an evaluation's numbers from its samples")
    report.add_argument("evaluation", type=Path, help="folder of an evaluation")
    report.add_argument("--regrade", action="store_true", help="grade the kept responses again first")
    report.add_argument("--trust", action="store_true", help=_TRUST)
    compare = add("compare", "evaluation.command:compare", "paired differences between two evaluations")
    compare.add_argument("a", type=Path, metavar="A", help="folder of an evaluation")
    compare.add_argument("b", type=Path, metavar="B", help="another one on the same questions")
    compare.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    bench = "seconds and memory of a step against stock verl GRPO and binary TV"
    _add_bench_arguments(add("bench", "bench.command:bench", bench))
    doctor = add("doctor", "doctor.command:doctor", "check machine, installation and a run's files", _DOCTOR_HELP)
    doctor.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, as for train")
    doctor.add_argument("--no-ray", dest="ray", action="store_false", help="neither start nor join Ray")
    doctor.add_argument("--json", dest="as_json", action="store_true", help="one JSON object a line")
    plot = add("plot", "figures.command:plot", "draw the paper's figures of one or several runs", _PLOT_HELP)
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    plot.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/plots; of several runs plots")
    table = add("table", "figures.command:table", "Avg@k of several runs with errors, the paper's numbers beside",
                _TABLE_HELP)  # fmt: skip
    table.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    table.add_argument("--format", dest="kind", choices=("markdown", "json", "latex"), default="markdown")
    table.add_argument("--at", choices=("best", "last"), default="best", help="checkpoint of each run (default: best)")
    table.add_argument("--until", type=_positive, metavar="STEP", help="only checkpoints up to it (the paper's T_stop)")
    table.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    calibrate = add("calibrate", "training.calibration:calibrate", "what delta and delta_b would mask in a run's dumps")
    calibrate.add_argument("run", type=Path, metavar="RUN", help="run folder with dumped steps (run.dump_steps)")
    calibrate.add_argument("--w-min", type=_between(0, 1), help="weight of the last token (default: the run's, or 0.8)")
    wanted = "of the tokens, that the suggested budgets mask (default: 0.02)"
    calibrate.add_argument("--share", type=_between(0, 1), default=0.02, help=wanted)
    calibrate.add_argument("--json", dest="as_json", action="store_true", help="one JSON object")
    overlap = add("overlap", "inspection.overlap:overlap", "what every method would mask of a run's dumped steps")
    overlap.add_argument("run", type=Path, metavar="RUN", help="run folder with dumped steps (run.dump_steps)")
    overlap.add_argument("--step", type=_seed, metavar="N", help="only this step (default: every dumped one)")
    overlap.add_argument("--where", metavar="METHOD", help="where tokens lie that one of cppo and METHOD masks")
    overlap.add_argument("--json", dest="as_json", action="store_true", help="one JSON object")
    inspect = add("inspect", "inspection.command:inspect", "write a page to read dumped responses token by token")
    dumped = "run folder with dumped steps (run.dump_steps, run.inspect_every)"
    inspect.add_argument("run", type=Path, metavar="RUN", help=dumped)
    inspect.add_argument("--step", type=_seed, metavar="N", help="only this step (default: every dumped one)")
    inspect.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/inspect.html")
    inspect.add_argument("--tokens", type=_positive, default=400_000, help="at most so many a step (default: 400000)")
    return parser


def _add_prepare_arguments(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument("--out", type=Path, default=Path("data"), help="folder to write (default: data)")
    prepare.add_argument("--train", nargs="*", metavar="SET", default=["dapo"], help="training sets (default: dapo)")
    prepare.add_argument(
        "--eval",
        dest="held_out",
        nargs="*",
        metavar="SET",
        default=["aime24", "aime25", "aime26", "math500"],
        help="evaluation sets, removed from the training sets (default: aime24 aime25 aime26 math500)",
    )
    prepare.add_argument("--template", choices=("boxed", "answer"), default="boxed", help="prompt (default: boxed)")
    prepare.add_argument("--revision", help="commit, tag or branch of every hub repository (default: its newest)")


def _add_eval_arguments(evaluate: argparse.ArgumentParser) -> None:
    """`cppo_verl.evaluation.request.Options` says what each is when it is not given."""
    evaluate.argument_default = argparse.SUPPRESS
    add = evaluate.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--all", dest="every", action="store_true", default=False,
        help="every checkpoint of a run; the best again with fresh seeds, and the last")  # fmt: skip
    add("--data", nargs="+", type=Path, metavar="FILE", help="verl parquet files (default: the run's, or data/aime*)")
    add("-n", type=_positive, help="samples per question")
    add("--temperature", type=_between(0, math.inf))
    add("--top-p", type=_between(0, 1))
    add("--max-tokens", type=_positive, help="longest response")
    add("--thinking", action=argparse.BooleanOptionalAction, help="enable_thinking of the chat template")
    add("--seed", type=_seed, help="another one samples afresh")
    add("--limit", type=_positive, help="only the first questions of each benchmark")
    add("--tensor-parallel", type=_positive, help="GPUs of one copy of the model; copies fill the GPUs that Ray sees")
    add("--out", type=Path, metavar="FOLDER", help="default: RUN/eval/step_N-seedS, or evals/NAME-seedS")
    add("--revision", help="commit, tag or branch of a hub id")
    add("--trust", action="store_true", help=_TRUST)


def _add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, as for train")
    bench.add_argument("--rounds", type=int, default=30, help="rounds of one step of each variant, 2 or more")
    bench.add_argument(
        "--against",
        nargs="+",
        choices=OTHERS,
        default=list(OTHERS),
        help="what to compare with (default: all); write -- before overrides that follow",
    )
    random = bench.add_mutually_exclusive_group()
    random.add_argument(
        "--vocabulary", type=_positive, help="use a tiny random model with this many tokens, e.g. 151936"
    )
    random.add_argument("--shape", metavar="NAME", help="use random weights of that shape, e.g. Qwen3-1.7B")
    instead = bench.add_mutually_exclusive_group()
    instead.add_argument(
        "--costs", type=Path, metavar="FOLDER", help="instead: cost of each part of ours as work grows"
    )
    instead.add_argument(
        "--quick", action="store_true", help="instead: ratios against the committed ones; exit status 1 above a limit"
    )
    instead.add_argument(
        "--schedule", action="store_true", help="instead: what the asynchronous modes would gain, by simulation"
    )
    bench.add_argument("--write", action="store_true", help="with --quick: measure the committed ratios anew")


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    number = int(text) if text.isascii() and text.lstrip("-").isdecimal() and len(text) < 20 else least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more; got {one_line(text)[:40]}")
    return number


def _between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            span = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number, {span}; got {one_line(text)[:40]}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
