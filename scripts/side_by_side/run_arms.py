"""``python run_arms.py FOLDER``: run what is missing of every repeat, an arm at a time, in a seeded random order.

FOLDER receives ``versions.json``, ``side_by_side.jsonl`` and ``repeat-N/`` with the assets and what the arms write.
An arm that has finished is not run again; one that has failed is.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from arms import ARMS, OURS, ROOT, command, our_settings
from omegaconf import DictConfig
from records import Record, append, attempts, finished, ours_measured, stock_measured, trl_measured

from cppo_verl.config.compose import compose
from cppo_verl.run import lifeline
from cppo_verl.run.manifest import manifest
from cppo_verl.run.supervisor import RUN_TAG, end_run, process_environment

# Lines of a failed arm's log that are kept in its record.
LOG_LINES = 20
POLL_SECONDS = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(prog="run_arms.py")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat; each further one has the next")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--evaluate-every", type=int, default=5, help="steps; also before the first and after the last")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-trl/bin/python"), help="of TRL's environment")
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: getattr(asked, name) for name in ("seed", "steps", "evaluate_every")}
    earlier = [last[0]["told"] for *_, last in attempts(folder).values() if last[0]["told"] != told]
    if earlier:
        parser.error(f"{folder} holds a comparison of {earlier[0]}, not of {told}: give another folder")
    (folder / "versions.json").write_text(json.dumps(versions(asked.trl_python), indent=2) + "\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the arm that runs is ended
    all_well = True
    for repeat in range(asked.repeats):
        seed, here = asked.seed + repeat, folder / f"repeat-{repeat}"
        done = {arm for (number, arm), (*_, last) in attempts(folder).items() if number == repeat and finished(last)}
        order = random.Random(f"side-by-side-{seed}").sample(ARMS, len(ARMS))
        missing = [arm for arm in order if arm in asked.arms and arm not in done]
        if not missing:
            continue
        build = [sys.executable, "-m", "cppo_verl.quickstart", "--out", str(here / "assets"), "--seed", str(seed)]
        subprocess.run(build, check=True)
        settings = our_settings(here / "assets", here, seed, asked.steps, asked.evaluate_every)
        for arm in missing:
            print(f"repeat {repeat + 1} of {asked.repeats}, seed {seed}: {arm}", end=" ", flush=True)
            attempt = run_arm(arm, here, settings, asked.trl_python)
            attempt[0]["told"] = told
            append(folder, [{"repeat": repeat, "seed": seed, "arm": arm, **record} for record in attempt])
            print(f"{attempt[-1]['event']} after {attempt[-1]['seconds']:.0f} s", flush=True)
            all_well = all_well and finished(attempt)
    return 0 if all_well else 1


def versions(trl_python: str) -> dict[str, Any]:
    """Of both environments and the machine."""
    ours = manifest(sys.argv)
    ours["hardware"].pop("machine")
    names = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "math-verify")
    code = (
        "import importlib.metadata as m, json, platform; "
        f"print(json.dumps({{'python': platform.python_version(), **{{n: m.version(n) for n in {names}}}}}))"
    )
    theirs = subprocess.run([trl_python, "-c", code], capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": ours["commit"],
        "hardware": ours["hardware"],
        "cppo, grpo, stock": {"python": ours["python"], **ours["packages"]},
        "trl": json.loads(theirs.stdout) if theirs.returncode == 0 else theirs.stderr.strip(),
    }


def run_arm(arm: str, here: Path, settings: list[str], trl_python: str) -> list[Record]:
    """Run one arm to its end; its records: "started", what it measured, and "finished" or "failed"."""
    config = compose(settings)
    target, log_file = here / arm, here / f"{arm}.log"
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that failed or was interrupted
    if arm not in OURS:  # cppo train makes its run folder itself
        target.mkdir()
    words = command(arm, settings, here, trl_python)
    tag, metrics = uuid.uuid4().hex, target / "metrics.jsonl"
    environment = environment_of(arm, str(config.actor_rollout_ref.model.path), metrics)
    arrivals: list[float] = []
    started = time.time()
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**environment, RUN_TAG: tag},
            cwd=target
            if target.exists()
            else here.parent,  # not here: Python would take the folder trl for the package
            preexec_fn=lifeline.tie,
        )
        try:
            while process.poll() is None:
                if arm == "stock":  # verl's file has no times: it and each of its lines count from when they are there
                    arrivals += [time.time()] * (_lines(metrics) - len(arrivals))
                time.sleep(POLL_SECONDS)
        finally:
            end_run(process, tag, patience=15)
    closing: Record = {"event": "finished", "seconds": time.time() - started}
    if process.returncode != 0:
        tail = _without_places(log_file.read_text(errors="replace"), here).splitlines()[-LOG_LINES:]
        closing |= {"event": "failed", "status": process.returncode, "log": tail}
    opening = {
        "event": "started",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "command": _without_places(shlex.join(words), here),
    }
    return [opening, *_measured(arm, target, arrivals, started, config), closing]


def environment_of(arm: str, model: str, metrics: Path) -> dict[str, str]:
    """Of an arm's process: what ``cppo train`` gives its own for verl on a CPU, nothing but the grader for TRL."""
    if arm in OURS:
        return dict(os.environ)  # cppo train adds the rest itself
    if arm == "stock":
        return {**process_environment(True, model), "VERL_FILE_LOGGER_PATH": str(metrics)}
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _measured(arm: str, target: Path, arrivals: list[float], started: float, config: DictConfig) -> list[Record]:
    responses = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    if arm == "trl":
        return trl_measured(target / "events.jsonl", started)
    if arm == "stock":
        return stock_measured(target / "metrics.jsonl", arrivals, started, responses)
    return ours_measured(target, started, responses)


def _without_places(text: str, here: Path) -> str:
    """The same wherever checkout, environment and folder lie."""
    places = {here.parent: "FOLDER", Path(sys.executable).parent: ".venv/bin", ROOT: "."}
    for place, name in places.items():
        text = text.replace(str(place), name)
    return text


def _lines(file: Path) -> int:
    """How many lines there are, and one for the file itself."""
    return 1 + file.read_bytes().count(b"\n") if file.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
