"""The ``cppo`` command. Heavy imports happen after the arguments are parsed, so that ``cppo --help`` is immediate."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TRAIN_HELP = """\
Every override is Hydra's: method=dppo, method.delta=0.2, divergence=binary_kl, trainer.total_training_steps=100 ...
Groups: method, divergence, platform, recipe (files under configs/). Without platform= a GPU is used where there is one.
"""


# What ``cppo bench`` can train a step of (cppo_verl/adapters/bench.py).
BENCH_VARIANTS = ("ours", "binary", "stock", "stock-bypass-off")


_PREPARE_HELP = """\
SET is dapo, aime24, aime25, aime26 or math500 from the Hugging Face hub, or NAME=FILE (.jsonl or .parquet with
problem and answer columns), or NAME=HUB/REPOSITORY. Writes OUT/NAME.parquet for each and OUT/manifest.json.
"""


_EVAL_HELP = """\
CHECKPOINT is a Hugging Face folder or hub id, a run folder (its latest checkpoint), or one of its
checkpoints/global_step_N; verl's shards are merged when needed. Settings that are not given are those of the run's
validation. A killed evaluation goes on where it was when the same command is given again.
"""


_MERGE_HELP = """\
CHECKPOINT is a run folder (its latest checkpoint), one of its checkpoints/global_step_N, or verl's folder of shards.
"""


_DOCTOR_HELP = """\
Without overrides the machine and the installation are examined; with those of a run (recipe=..., data.train_files=...)
its settings, data, model and disk as well. Exit status: 0 when nothing FAILs, 1 otherwise, 2 for overrides that cannot
be composed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status (2: a setting is wrong)."""
    parser = _parser()
    # argparse gives up on positionals that follow an option; recipes append "$@" after theirs.
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    from cppo_verl import __version__

    parser = argparse.ArgumentParser(prog="cppo", description="CPPO on verl: RLVR with a prefix-aware trust region.")
    parser.add_argument("--version", action="version", version=f"cppo_verl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=text, epilog=more, formatter_class=raw)
        command.set_defaults(run=run)
        return command

    train = add("train", _train, "train a model", _TRAIN_HELP)
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    train.add_argument("--dry-run", action="store_true", help="compose, check and print the configuration, then stop")
    _add_prepare_arguments(add("prepare", _prepare, "make verl's data files from the hub or from files", _PREPARE_HELP))
    _add_eval_arguments(add("eval", _eval, "sample a checkpoint and report Avg@k with its errors", _EVAL_HELP))
    merge = add("merge", _merge, "make a Hugging Face folder with a model card of a checkpoint", _MERGE_HELP)
    merge.add_argument("checkpoint", metavar="CHECKPOINT")
    merge.add_argument("--out", type=Path, metavar="FOLDER", help="default: global_step_N/merged")
    report = add("report", _report, "recompute an evaluation's numbers from its samples")
    report.add_argument("evaluation", type=Path, help="folder of an evaluation")
    report.add_argument("--regrade", action="store_true", help="grade the kept responses again first")
    compare = add("compare", _compare, "paired differences between two evaluations")
    compare.add_argument("a", type=Path, metavar="A", help="folder of an evaluation")
    compare.add_argument("b", type=Path, metavar="B", help="another one on the same questions")
    compare.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    bench = add("bench", _bench, "seconds and memory of a step against stock verl GRPO and binary TV")
    bench.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, as for train")
    bench.add_argument("--rounds", type=int, default=30, help="rounds of one step of each variant, 2 or more")
    bench.add_argument(
        "--against",
        nargs="+",
        choices=BENCH_VARIANTS[1:],
        default=list(BENCH_VARIANTS[1:]),
        help="what to compare with (default: all); write -- before overrides that follow",
    )
    bench.add_argument("--vocabulary", type=int, help="use a tiny random model with this many tokens, e.g. 151936")
    doctor = add("doctor", _doctor, "check machine, installation and a run's files", _DOCTOR_HELP)
    doctor.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, as for train")
    doctor.add_argument("--no-ray", dest="ray", action="store_false", help="neither start nor join Ray")
    doctor.add_argument("--json", action="store_true", help="one JSON object a line")
    plot = add("plot", _plot, "draw the plots of a run folder")
    plot.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    return parser


def _add_prepare_arguments(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument("--out", type=Path, default=Path("data"), help="folder to write (default: data)")
    prepare.add_argument("--train", nargs="*", metavar="SET", default=["dapo"], help="training sets (default: dapo)")
    prepare.add_argument(
        "--eval",
        nargs="*",
        metavar="SET",
        default=["aime24", "aime25", "aime26", "math500"],
        help="evaluation sets, removed from the training sets (default: aime24 aime25 aime26 math500)",
    )
    prepare.add_argument("--template", choices=("boxed", "answer"), default="boxed", help="prompt (default: boxed)")
    prepare.add_argument("--revision", help="commit, tag or branch of every hub repository (default: its newest)")


def _add_eval_arguments(evaluate: argparse.ArgumentParser) -> None:
    """What is not given is taken from the run (`cppo_verl.evaluation.command.Options`)."""
    add = evaluate.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--all", action="store_true", help="every checkpoint of a run; the best again with fresh seeds, and the last")
    add("--data", nargs="+", type=Path, metavar="FILE", help="verl parquet files (default: the run's, or data/aime*)")
    add("-n", type=_positive, help="samples per question (default: 16)")
    add("--temperature", type=float, help="default: 0.7")
    add("--top-p", type=float, help="default: 0.95")
    add("--max-tokens", type=_positive, help="longest response (default: max_response_length of the run)")
    add("--thinking", action=argparse.BooleanOptionalAction, help="enable_thinking of the chat template")
    add("--seed", type=int, default=0, help="another seed samples afresh (default: 0)")
    add("--limit", type=_positive, help="only the first questions of each benchmark")
    add("--tensor-parallel", type=_positive, help="GPUs of one copy of the model; copies fill the GPUs that Ray sees")
    add("--out", type=Path, metavar="FOLDER", help="default: RUN/eval/step_N-seedS, or evals/NAME-seedS")
    add("--revision", help="commit, tag or branch of a hub id")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _checked(command: str, overrides: list[str], planned: bool = False) -> "DictConfig | None":
    """The composed configuration, or None after its problems were printed.

    Args:
        planned: the run is for another machine: what is absent on this one is printed as well, but refuses nothing.
    """
    from cppo_verl.config import ConfigError, compose
    from cppo_verl.validation import validate

    try:
        config = compose(overrides)
        for absent in validate(config, planned):
            print(f"cppo {command}: not on this machine: {absent}", file=sys.stderr)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"cppo {command}: {line}", file=sys.stderr)
        return None
    return config


def _train(options: argparse.Namespace) -> int:
    config = _checked("train", options.overrides, planned=options.dry_run)
    if config is None:
        return 2
    if options.dry_run:
        from omegaconf import OmegaConf

        from cppo_verl.dry_run import report

        text = OmegaConf.to_yaml(config, resolve=True)
        terminal = sys.stdout.isatty()
        lines, warnings = report(config)
        for line in lines:
            print(line if terminal else f"# {line}")
        print(f"the resolved configuration, {text.count(chr(10))} lines of YAML: add > FILE" if terminal else text)
        for warning in () if terminal else warnings:
            print(f"# warning: {warning}", file=sys.stderr)
        warned = f", {len(warnings)} warning{'s' * (len(warnings) > 1)}" if warnings else ""
        checked = f"{config.method.name} over {config.divergence.name}{warned}"
        print(f"# checked: {checked}; nothing was started", file=sys.stderr)
        return 0
    from cppo_verl.launcher import launch

    return launch(config, ["cppo", "train", *options.overrides])


def _prepare(options: argparse.Namespace) -> int:
    from cppo_verl.data.prepare import parse_request, prepare
    from cppo_verl.data.sources import DataError

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        train, held_out = ([parse_request(text) for text in texts] for texts in (options.train, options.eval))
        manifest = prepare(train, held_out, options.out, options.template, options.revision, progress=say)
    except DataError as error:
        print(f"cppo prepare: {error}", file=sys.stderr)
        return 2
    for name, entry in manifest["sets"].items():
        for removed in entry["removed"]:
            if removed["reason"].startswith("is in "):
                print(f"{name}: {removed['id']} {removed['reason']}: left out")
    print(f"manifest: {options.out / 'manifest.json'}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    from cppo_verl.evaluation.command import Options, evaluate, evaluate_all

    chosen = {field.name: getattr(options, field.name) for field in fields(Options)}
    run = evaluate_all if options.all else evaluate
    return _refusing("eval", lambda: run(options.checkpoint, Options(**chosen), ["cppo", *sys.argv[1:]]))


def _merge(options: argparse.Namespace) -> int:
    from cppo_verl.checkpoints import export, find

    def merge() -> int:
        print(f"written: {export(find(options.checkpoint, on_hub=False), options.out, say=print)}")
        return 0

    return _refusing("merge", merge)


def _report(options: argparse.Namespace) -> int:
    from cppo_verl.evaluation.command import report

    return _refusing("report", lambda: report(options.evaluation, options.regrade))


def _compare(options: argparse.Namespace) -> int:
    from cppo_verl.evaluation.command import compare

    return _refusing("compare", lambda: compare(options.a, options.b, options.out))


def _refusing(command: str, action: Callable[[], int]) -> int:
    """The action's exit status, or 2 after the message of a setting that cannot work."""
    from cppo_verl.config import ConfigError

    try:
        return action()
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"cppo {command}: {line}", file=sys.stderr)
    except OSError as error:
        print(f"cppo {command}: {error.strerror}: {error.filename}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def _bench(options: argparse.Namespace) -> int:
    overrides, rounds, against, vocabulary = options.overrides, options.rounds, options.against, options.vocabulary
    if rounds < 2:
        print("cppo bench: --rounds must be 2 or more; an interval needs at least two", file=sys.stderr)
        return 2
    from omegaconf import OmegaConf

    from cppo_verl.config import compose, run_folder
    from cppo_verl.launcher import launch
    from cppo_verl.report import bench_rows

    variants = [BENCH_VARIANTS[0], *against]
    fixed = [
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={len(variants) * (rounds + 1)}",
        f"+bench.rounds={rounds}",
        f"+bench.variants=[{','.join(variants)}]",
        "+bench.divergence=null",
        "+bench.binary=null",
    ]
    if vocabulary is not None:
        folder, megabytes = _wide_model(vocabulary)
        bucket = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
        fixed += [f"actor_rollout_ref.model.path={folder}", f"{bucket}={megabytes}"]
    config = _checked("bench", [*overrides, *fixed])
    if config is None:
        return 2
    # Taken out of the divergence node, which a step of the "binary" variant replaces.
    config.bench.divergence = OmegaConf.to_container(config.divergence, resolve=True)
    config.bench.binary = OmegaConf.to_container(compose(["divergence=binary_tv"]).divergence, resolve=True)
    command = ["cppo", "bench", "--rounds", str(rounds), "--against", *against]
    command += [] if vocabulary is None else ["--vocabulary", str(vocabulary)]
    status = launch(config, [*command, "--", *overrides], module="cppo_verl.adapters.bench")
    for name, text in bench_rows(run_folder(config)) if status == 0 else ():
        print(f"{name:<32} {text}")
    return status


def _wide_model(vocabulary: int) -> tuple[Path, int]:
    """The quickstart's model with random weights and ``vocabulary`` tokens, made once, and its embedding's MiB + 1."""
    from cppo_verl.quickstart.model import ModelShape, build_model, build_tokenizer

    folder = Path(f"runs/bench-model-{vocabulary}").absolute()
    shape = ModelShape(vocabulary=vocabulary)
    if not (folder / "tokenizer_config.json").exists():  # written last: an interrupted build is made again
        tokenizer = build_tokenizer(shape)
        build_model(shape, tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder, 4 * vocabulary * shape.hidden_size // 2**20 + 1


def _doctor(options: argparse.Namespace) -> int:
    from cppo_verl.doctor import doctor

    try:
        return doctor(options.overrides, ray=options.ray, as_json=options.json)
    except KeyboardInterrupt:
        return 130


def _plot(options: argparse.Namespace) -> int:
    from cppo_verl.plots import plot_run

    run: Path = options.folder
    if not (run / "metrics.jsonl").exists():
        print(f"cppo plot: {run} is not a run folder (no metrics.jsonl)", file=sys.stderr)
        return 2
    for path in plot_run(run):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
