"""``python -m cppo_verl.quickstart --out DIR --seed S``: build the toy task and its warm-started model.

DIR receives ``model/`` (a Hugging Face checkpoint), ``train.parquet``, ``heldout.parquet`` and
``manifest.json``.  Repeating a command whose manifest is already there does nothing; with ``--is-built`` nothing is
done otherwise either, and the exit status tells.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from cppo_verl.quickstart.flags import parser_of, settings_from, summary, wrong_number
from cppo_verl.quickstart.specs import MANIFEST, ModelShape, WarmupSpec
from cppo_verl.quickstart.task import TaskSpec, make_splits
from cppo_verl.run.files import DamagedFile, read_json

FLAG_HELP = {
    "terms": "operands in a sum",
    "operand_max": "operands are 1 to this",
    "calculator": "careful answers call a calculator instead of working",
    "warmup_problems": "problems of the supervised phase",
    "train_problems": "problems in train.parquet",
    "heldout_problems": "problems in heldout.parquet, in neither of the other two sets",
    "hidden_size": "width of the network",
    "intermediate_size": "width of its feed-forward layers",
    "layers": "transformer layers",
    "heads": "query heads",
    "key_value_heads": "key and value heads",
    "head_dim": "width of a head",
    "max_positions": "longest prompt plus answer, in tokens",
    "vocabulary": "tokens of the vocabulary, unused ones filling it up; 0: no more than the task has",
    "steps": "optimiser steps of the supervised phase",
    "batch_size": "examples in a step",
    "learning_rate": "peak learning rate",
    "worked_share": "share of examples in the worked style; the others list the operands and guess",
}
SPECS = {"task": TaskSpec, "model": ModelShape, "warmup": WarmupSpec}


def build_parser() -> argparse.ArgumentParser:
    """One flag for every knob, its default the tuned one."""
    parser = parser_of(
        "python -m cppo_verl.quickstart",
        "Build the toy arithmetic task and a small Qwen3 warm-started on it.",
        SPECS,
        FLAG_HELP,
        seed="the splits, the weights and the warm start",
        samples=16,
        max_tokens=40,
    )
    parser.add_argument("--is-built", action="store_true", help="build nothing: exit status 1 if it is not there")
    return parser


def built_with(out: Path) -> dict[str, Any] | None:
    """The settings of the build in ``out``; None where there is none, whatever else has a manifest there."""
    try:
        manifest = read_json(out / MANIFEST, "", "settings", "heldout_sampled")
    except (OSError, DamagedFile):
        return None
    return dict(manifest["settings"])


def others_in(out: Path) -> list[str]:
    """What lies in a build's folder beside the build, which replacing it would delete."""
    return sorted({path.name for path in out.iterdir()} - {MANIFEST, "model", "train.parquet", "heldout.parquet"})


def main() -> None:
    """Build unless the same build is there already; refuse to replace a directory that is not a build."""
    parser = build_parser()
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    settings = settings_from(arguments, SPECS)
    if wrong := wrong_number(settings, SPECS):
        parser.error(wrong)
    try:
        make_splits(TaskSpec(**settings["task"]), settings["seed"])
    except ValueError as error:
        parser.error(str(error))
    built = built_with(out)
    if built == settings:
        print(f"{out} already holds this build; nothing to do")
        return
    if arguments.is_built:
        raise SystemExit(1)
    if out.exists() and built is None and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} exists and is not a quickstart build; move it or choose another --out")
    if built is not None and (out.is_symlink() or others_in(out)):
        beside = ", ".join(others_in(out))
        parser.error(f"{out} holds more than another build ({beside or 'a link'}); move it or choose another --out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is half built is removed
    print(f"warming up a tiny Qwen3 on sums: {settings['warmup']['steps']} steps of supervised training", flush=True)
    from cppo_verl.quickstart.build import build_atomically  # with torch, for which a finished build need not wait

    print(summary(out, build_atomically(out, settings)))


if __name__ == "__main__":
    main()
