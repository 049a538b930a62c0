"""``python -m cppo_verl.smollm2 --out DIR --seed S``: fetch SmolLM2, make the worded sums, warm the model up on them.

DIR receives ``source/`` (the file as it was fetched), ``base/`` (the model as it is), ``model/`` (warm-started),
``train.parquet``, ``heldout.parquet`` and, last, ``manifest.json``.  What an interrupted command has fetched and
converted is kept, its warm start begins anew; repeating one whose manifest is already there does nothing.
"""

import argparse
import fcntl
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from cppo_verl.problems import ConfigError
from cppo_verl.quickstart.flags import parser_of, settings_from, summary, wrong_number
from cppo_verl.quickstart.specs import Supervised
from cppo_verl.quickstart.task import write_parquet
from cppo_verl.quickstart.warmup import SampledAccuracy, measure, run_warmup, warn_off_target
from cppo_verl.run.files import DamagedFile, read_json, write_atomically
from cppo_verl.smollm2.model import GGUF, GGUF_SHA256, PACKAGE, WHEEL, convert, lacking, load, made_whole
from cppo_verl.smollm2.task import DATA_SOURCE, TaskSpec, WordedSum, make_splits, worked

MANIFEST, LOCK = "manifest.json", ".lock"
MADE = {MANIFEST, LOCK, WHEEL, "source", "base", "model", "train.parquet", "heldout.parquet"}
# Folders that made_whole() had not finished when it was killed, and the wheel's.
UNFINISHED = (".source-", ".base-", ".model-", ".wheel-")
ACCURACY_RANGE = (0.25, 0.45)
MIN_BOXED_SHARE = 0.90
# Problems that are sampled together: what a chunk takes is the time between two signs of life.
CHUNK = 16


FLAG_HELP = {
    "operand_max": "numbers are 1 to this",
    "two_step_share": "share of sums of two steps; the others have one",
    "warmup_problems": "problems of the supervised phase",
    "train_problems": "problems in train.parquet",
    "heldout_problems": "problems in heldout.parquet, whose sums are in neither of the other two sets",
    "steps": "optimiser steps of the supervised phase",
    "batch_size": "examples in a step",
    "learning_rate": "peak learning rate",
}


@dataclass(frozen=True)
class Warmup(Supervised):
    """The supervised phase, short: a trained model is shown how to answer, and still errs."""

    steps: int = 20
    batch_size: int = 12
    learning_rate: float = 1e-4


SPECS = {"task": TaskSpec, "warmup": Warmup}


def build_parser() -> argparse.ArgumentParser:
    """One flag for every knob, its default the one that the documentation's numbers are of."""
    return parser_of(
        "python -m cppo_verl.smollm2",
        "Fetch SmolLM2-135M-Instruct, make worded sums and warm the model up on them.",
        SPECS,
        FLAG_HELP,
        seed="the splits and the warm start",
        samples=2,
        max_tokens=32,
    )


def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[WordedSum], settings: dict[str, Any]
) -> SampledAccuracy:
    """The quickstart's measurement in chunks, with a sign of life after each."""
    started, parts = time.monotonic(), []
    for start in range(0, len(problems), CHUNK):
        chunk = problems[start : start + CHUNK]
        limits = settings["measure_samples"], settings["measure_max_tokens"]
        parts.append((len(chunk), measure(model, tokenizer, chunk, *limits, settings["seed"] + start)))
        done, seconds = start + len(chunk), time.monotonic() - started
        print(f"sampling held-out problem {done}/{len(problems)}  {seconds:.0f} s", flush=True)
    mean = {
        name: sum(size * getattr(part, name) for size, part in parts) / len(problems)
        for name in ("accuracy", "boxed_share", "mean_tokens")
    }
    return SampledAccuracy(**mean)


def build(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Fill ``out``, the manifest last, and return the manifest."""
    seed: int = settings["seed"]
    splits = make_splits(TaskSpec(**settings["task"]), seed)
    base = convert(out)
    started = time.monotonic()
    (out / MANIFEST).unlink(missing_ok=True)  # from here on what it vouches for is replaced
    model, tokenizer = load(base)
    warmup = Warmup(**settings["warmup"])
    print(f"warming it up on sums: {warmup.steps} steps of supervised training", flush=True)
    run_warmup(model, tokenizer, splits.warmup, worked, warmup, seed)
    sampled = sampled_accuracy(model, tokenizer, splits.heldout, settings)
    warn_off_target(sampled, ACCURACY_RANGE, MIN_BOXED_SHARE)
    with made_whole(out / "model") as folder:
        disable_progress_bar()  # one file, written at once
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for split in ("train", "heldout"):
        write_parquet(getattr(splits, split), split, out / f"{split}.parquet", DATA_SOURCE)
    manifest = {
        "settings": settings,
        "model": {"package": PACKAGE, "file": GGUF, "sha256": GGUF_SHA256},
        "problems": {name: len(getattr(splits, name)) for name in ("warmup", "train", "heldout")},
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "heldout_sampled": asdict(sampled),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def built_with(out: Path) -> dict[str, Any] | None:
    """The settings of the finished build in ``out``, None where there is none."""
    try:
        return dict(read_json(out / MANIFEST, "", "settings", "heldout_sampled")["settings"])
    except (OSError, DamagedFile):
        return None


def refusal(out: Path, settings: dict[str, Any]) -> str | None:
    """Why a build cannot work, before anything of it is done."""
    if out.exists() and not out.is_dir():
        return f"{out} is no folder; choose another --out"
    if others := others_in(out):
        return f"{out} holds other things ({', '.join(others[:3])}); move them or choose another --out"
    if wrong := wrong_number(settings, SPECS):
        return wrong
    try:
        make_splits(TaskSpec(**settings["task"]), settings["seed"])
    except ValueError as error:
        return str(error)
    return None if (out / "base").is_dir() else lacking()


def others_in(out: Path) -> list[str]:
    """What lies in a build's folder that no build has made."""
    if not out.is_dir():
        return []
    return sorted(path.name for path in out.iterdir() if path.name not in MADE and not path.name.startswith(UNFINISHED))


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """No other command builds in the folder; what killed ones have left unfinished is removed."""
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another command is building in {out}: wait for it, or choose another --out") from None
        for path in out.iterdir():
            if path.name.startswith(UNFINISHED):
                shutil.rmtree(path)
        yield


def main() -> None:
    """Build unless the same build is there already; refuse what cannot work before anything starts."""
    parser = build_parser()
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    settings = settings_from(arguments, SPECS)
    if built_with(out) == settings:
        print(f"{out} already holds this build; nothing to do")
        return
    if reason := refusal(out, settings):
        parser.error(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is half made is removed
    out.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(out):
            manifest = build(out, settings)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(summary(out, manifest))


if __name__ == "__main__":
    main()
