"""Many steps in one go: does a run grow?

    python tests/live/soak.py FOLDER [--steps 500] [--assets ASSETS] [OVERRIDE ...]

Trains the quickstart's task (ASSETS: made by python -m cppo_verl.quickstart; default an untrained model's) and notes
memory and open files of every process of the run after each step in FOLDER/samples.jsonl. FOLDER/result.json compares
the last fifth of the steps with the second, for the processes of each kind: they may not hold over 5% and 8 MiB more
each, not have more files open, and not be more, but for grading workers, of which a reward worker starts up to four as
it needs them, with two pipes to each; a step may take 10% longer. Given again after an interruption the run goes on;
what is compared is the longest attempt.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
from leftovers import leftovers
from small_run import base_overrides, make_assets

from cppo_verl.run.log import read_metrics

CPPO = Path(sys.executable).parent / "cppo"
MEMORY, FILES, TIME = 0.05, 0, 0.10
# Processes that are started as they are needed, by whom, and the files that are open there for each.
POOL, POOLING, PIPES = "grading.worker", "ray::RewardLoopWorker", 2
# Of a process so small that a few pages more are 5%.
SLACK = 8 * 2**20


def roles(run: Path) -> dict[str, dict[str, float]]:
    """Private memory in bytes, open files and number of the run's processes, by what each calls itself."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"memory": 0, "files": 0, "processes": 0})
    for process in leftovers(run):
        try:
            role = role_of(process)
            # Shared pages (the object store, forked imports) would be counted once a process.
            found[role]["memory"] += process.memory_full_info().uss
            found[role]["files"] += process.num_fds()
            found[role]["processes"] += 1
        except psutil.Error:  # ended meanwhile
            continue
    return dict(found)


def role_of(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    title = words[0] if words[0].startswith(("ray::", "VLLM::")) else " ".join(words)
    known = (
        POOL,
        "bin/cppo",
        "adapters.driver.main",
        "raylet/raylet",
        "gcs_server",
        "dashboard/agent.py",
        "log_monitor",
        "runtime_env/agent",
    )
    return next((name for name in known if name in title), title.split(".")[0].split(" ")[0])


def sample(run: Path, process: subprocess.Popen, file: Path) -> None:
    """A line after every step, until the process ends."""
    seen = max(read_metrics(run), default=0) if run.exists() else 0
    attempt = time.time()
    while process.poll() is None:
        time.sleep(0.5)
        step = max(read_metrics(run), default=0) if run.exists() else 0
        if step > seen:
            seen = step
            with open(file, "a") as lines:
                lines.write(json.dumps({"attempt": attempt, "step": step, "roles": roles(run)}) + "\n")


def compare(samples: list[dict], seconds: dict[int, float]) -> dict:
    """Medians of the second and the last fifth of the longest attempt: growth by process, and of the time of a step."""
    attempts = defaultdict(list)
    for line in samples:
        attempts[line["attempt"]].append(line)
    longest = max(attempts.values(), key=len)
    fifth = len(longest) // 5
    early, late = longest[fifth : 2 * fifth], longest[-fifth:]
    grown = {}
    first, last = (
        statistics.median(line["roles"].get(POOL, {"processes": 0})["processes"] for line in part)
        for part in (early, late)
    )
    pipes = {POOLING: PIPES * max(last - first, 0)}
    for role in sorted(set.intersection(*(set(line["roles"]) for line in [*early, *late]))):
        before, after = (
            {
                kind: statistics.median(line["roles"][role][kind] for line in part)
                for kind in ("memory", "files", "processes")
            }
            for part in (early, late)
        )
        # Of one process.
        held, holds = (part["memory"] / part["processes"] for part in (before, after))
        files = [part["files"] / part["processes"] for part in (before, after)]
        grown[role] = {
            "processes": [part["processes"] for part in (before, after)],
            "mib": [round(size / 2**20, 1) for size in (held, holds)],
            "files": files,
            "grew": holds > max((1 + MEMORY) * held, held + SLACK)
            or files[1] > files[0] + FILES + pipes.get(role, 0)
            or (after["processes"] > before["processes"] and role != POOL),
        }
    times = [statistics.median(seconds[line["step"]] for line in part) for part in (early, late)]
    return {
        "steps": [longest[0]["step"], longest[-1]["step"]],
        "processes": grown,
        "seconds_a_step": [round(time, 3) for time in times],
        "slower": times[1] > (1 + TIME) * times[0],
    }


def soak(folder: Path, steps: int, assets: Path | None, overrides: list[str]) -> dict:
    """Run to the end and compare; the result is also FOLDER/result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    if assets is None:
        settings = base_overrides(folder / "assets")
        if not (folder / "assets" / "heldout.parquet").exists():
            make_assets(folder / "assets")
    else:
        settings = ["platform=cpu", "recipe=quickstart", f"quickstart.assets={assets.absolute()}"]
    settings += [f"trainer.total_training_steps={steps}", "trainer.test_freq=-1", "trainer.val_before_train=false"]
    settings += ["trainer.save_freq=50", "trainer.max_actor_ckpt_to_keep=1", "run.dump_steps=[]"]
    command = [CPPO, "train", *settings, f"run.dir={folder.absolute()}", "run.name=run", "run.resume=auto", *overrides]
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        sample(run.absolute(), process, folder / "samples.jsonl")
    lines = read_metrics(run)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "exit": process.returncode,
        **compare(samples, {step: line["timing_s/step"] for step, line in lines.items() if "timing_s/step" in line}),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--assets", type=Path)
    options, overrides = parser.parse_known_args()
    result = soak(options.folder, options.steps, options.assets, overrides)
    print(json.dumps(result, indent=1))
    grew = [role for role, found in result["processes"].items() if found["grew"]]
    return int(bool(result["exit"] or grew or result["slower"]))


if __name__ == "__main__":
    sys.exit(main())
