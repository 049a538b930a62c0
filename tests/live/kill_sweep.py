"""SIGKILL at random moments: a run that is killed and resumed against one that is not.

    python tests/live/kill_sweep.py FOLDER [--kills 5] [--steps 12] [--seed 0] [--mode colocate_async]

Each kill hits one process (driver, actor worker, vLLM server, raylet, launcher, in turn): one in five while the workers
start, the others at a random point of a random step. The same command with run.resume=auto goes on.
FOLDER/result.jsonl gets one line per kill and one with the comparison. Given again after an interruption, the command
goes on with the kills that are left.

No two runs of an asynchronous mode are the same. There the comparison is with what was to be trained: every step once,
four responses of each problem, no problem more often than another by more than one round.
"""

import argparse
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from small_run import base_overrides, make_assets, weights_of

from cppo_verl.checkpoint import retention
from cppo_verl.run.log import accuracies, read_lines, read_metrics

CPPO = Path(sys.executable).parent / "cppo"

# The process of a run that is killed, by a part of its command line or of the name it gives itself.
TARGETS = {
    "driver": "cppo_verl.adapters.driver.main",
    "actor worker": "ray::WorkerDict",
    "vLLM server": "ray::TopKServer",
    "raylet": "raylet/raylet",
    "launcher": "bin/cppo train",
}

START_SECONDS = 30.0  # within which a process is killed that is killed while the workers start


@dataclass(frozen=True)
class Moment:
    """In the step after ``steps`` further ones (None: while the workers start), when ``part`` of its time is over."""

    steps: int | None
    part: float

    @classmethod
    def drawn(cls, source: random.Random, steps: int, kills: int, starting: float = 0.0) -> "Moment":
        """One of ``kills`` of a run of so many steps, never in its last; ``starting``: the share of the former kind."""
        further = source.randrange((steps - 1) // kills)
        return cls(None if source.random() < starting else further, source.random())


class Sweep:
    def __init__(self, folder: Path, steps: int, extra: list[str]) -> None:
        self.folder, self.steps = folder, steps
        self.results = folder / "result.jsonl"
        if not (folder / "assets" / "heldout.parquet").exists():
            make_assets(folder / "assets")
        dumps = ",".join(str(step) for step in range(1, steps + 1))
        self.command = [
            *(str(CPPO), "train", *base_overrides(folder / "assets")),
            *("method.delta=0.004", "method.delta_b=0.0008", f"trainer.total_training_steps={steps}"),
            # Adam turns rounding into steps of the learning rate where a gradient is as small as that.
            *(
                "actor_rollout_ref.actor.optim.lr=1e-4",
                "trainer.save_freq=1",
                "trainer.test_freq=3",
                f"run.dump_steps=[{dumps}]",
            ),
            *(f"run.dir={folder}", "run.resume=auto", *extra),
        ]

    def run(self, name: str, *settings: str) -> int:
        """To the end, without a kill; returns the exit status."""
        if self.steps in retention.complete_steps(self.folder / name / "checkpoints"):
            return 0
        with open(self.folder / f"{name}.log", "a") as log:
            return subprocess.call([*self.command, f"run.name={name}", *settings], stdout=log, stderr=log)

    def kill_once(self, name: str, target: str, moment: Moment) -> dict:
        """Start or go on, kill ``target`` then, wait for the end."""
        run = self.folder / name
        before = set(read_metrics(run))
        saved = max(retention.complete_steps(run / "checkpoints"), default=0)
        (run / "events.jsonl").unlink(missing_ok=True)  # of the attempt before
        with open(self.folder / f"{name}.log", "a") as log:
            launcher = subprocess.Popen([*self.command, f"run.name={name}"], stdout=log, stderr=log)
            try:
                self._wait_for(lambda: processes(run, TARGETS[target]), launcher)
                delay, after = START_SECONDS * moment.part, "the process is there"
                if moment.steps is not None:
                    done = saved + moment.steps
                    self._wait_for(lambda: self._is_ready(run), launcher)
                    self._wait_for(lambda: not moment.steps or done in read_metrics(run), launcher)
                    delay = self._step_seconds(run) * moment.part
                    after = f"step {done}" if moment.steps else "workers are ready"
                deadline = time.time() + delay
                while time.time() < deadline and launcher.poll() is None:
                    time.sleep(0.05)
                phase = self._phase(run)
                for process in processes(run, TARGETS[target]):
                    process.send_signal(signal.SIGKILL)
                killed = time.time()
                status = launcher.wait(timeout=300)
                seconds = time.time() - killed
            finally:
                launcher.kill()
        time.sleep(15)  # the grace of processes whose launcher is gone
        left = [process.pid for process in processes(run, "")]
        return {
            **{"kind": "kill", "target": target, "after": after, "seconds": round(delay, 1), "phase": phase},
            **{"steps_before": len(before), "steps_after": len(read_metrics(run)), "exit_status": status},
            **{"seconds_to_end": round(seconds, 1), "processes_left": len(left)},
        }

    def _step_seconds(self, run: Path) -> float:
        """Of the run's last step, else of the unbroken run's, else ten."""
        for lines in (read_metrics(run), read_metrics(self.folder / "unbroken")):
            times = [line["timing_s/step"] for _, line in sorted(lines.items()) if "timing_s/step" in line]
            if times:
                return times[-1]
        return 10.0

    def _wait_for(self, condition: Callable[[], object], launcher: subprocess.Popen) -> None:
        deadline = time.time() + 600
        while not condition():
            if launcher.poll() is not None:
                raise RuntimeError(f"the run ended with {launcher.returncode} before it could be killed")
            if time.time() > deadline:
                raise TimeoutError("nothing to kill within 600 s")
            time.sleep(0.2)

    def _events(self, run: Path) -> list[str]:
        """ "initialized 3" and the like, in order."""
        path = run / "events.jsonl"
        events = read_lines(path) if path.exists() else ()
        return [" ".join(str(event[key]) for key in ("event", "step") if key in event) for event in events]

    def _is_ready(self, run: Path) -> bool:
        return any(event.startswith("initialized") for event in self._events(run))

    def _phase(self, run: Path) -> str:
        return (self._events(run) or ["starting"])[-1]

    def note(self, record: dict) -> None:
        record = {**record, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        print(json.dumps(record), flush=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(record) + "\n")

    def count(self, name: str) -> dict:
        """Of a run in an asynchronous mode: how often each problem was trained, by what the steps have dumped."""
        run, steps = self.folder / name, range(1, self.steps + 1)
        lines = [line["step"] for line in read_lines(run / "metrics.jsonl")]
        rows = [
            tuple(row.tolist()) for step in steps for dump in _dumps(run / "dumps", step) for row in dump["prompts"]
        ]
        responses = Counter(rows)
        rounds = {number // 4 for number in responses.values()}
        return {
            "kind": "comparison",
            "steps": lines,
            "every_step_once": lines == list(steps),
            "responses": len(rows),
            "responses_wanted": 32 * self.steps,
            "problems": len(responses),
            "problems_wanted": min(64, 8 * self.steps),
            "whole_groups": all(number % 4 == 0 for number in responses.values()),
            "rounds": sorted(rounds),
            "missing": sum(line.get("rollout/missing_responses", 0) for line in read_metrics(run).values()),
        }

    def compare(self, unbroken: str, killed: str) -> dict:
        """What the issue of resuming is about: every step once, the same tokens, the same weights."""
        a, b = self.folder / unbroken, self.folder / killed
        lines = [line["step"] for line in read_lines(b / "metrics.jsonl")]
        last = a / f"checkpoints/global_step_{self.steps}/actor"
        first, final = weights_of(a / "checkpoints/global_step_1/actor"), weights_of(last)
        resumed = weights_of(b / last.relative_to(a))
        steps = range(1, self.steps + 1)
        one, two = ([row for step in steps for row in sampled(run / "dumps", step)] for run in (a, b))
        return {
            "kind": "comparison",
            "steps": lines,
            "every_step_once": lines == list(steps),
            "largest_advantage": max(abs(value) for step in steps for value in advantages_of(a / "dumps", step)),
            "responses": len(one),
            "responses_equal": sum(x == y for x, y in zip(one, two, strict=True)),
            "weights_moved": float((final - first).abs().max()),
            "weights_differ": float((final - resumed).abs().max()),
            "weights_differ_relative_norm": float((final - resumed).norm() / final.norm()),
            "validations": sum(map(len, validations(a).values())),
            "validations_equal": validations(a) == validations(b),
        }


def processes(run: Path, text: str) -> list[psutil.Process]:
    """Processes of the run whose command line holds ``text``; with "" all that carry its tag."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            own = process.environ().get("CPPO_RUN_FOLDER") == str(run)
            if text in line and (own or (text == TARGETS["launcher"] and f"run.name={run.name}" in line)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _dumps(folder: Path, step: int) -> list[dict]:
    return [torch.load(path) for path in sorted((folder / f"step_{step}").glob("*.pt"))]


def sampled(folder: Path, step: int) -> list[list[int]]:
    """Every response's tokens of a step, in the order of the update."""
    found = []
    for dump in _dumps(folder, step):
        found += [row[mask.bool()].tolist() for row, mask in zip(dump["responses"], dump["response_mask"], strict=True)]
    return found


def advantages_of(folder: Path, step: int) -> list[float]:
    return [value for dump in _dumps(folder, step) for value in dump["advantages"].flatten().tolist()]


def validations(run: Path) -> dict[int, dict[str, float]]:
    """Validation accuracies by step."""
    return {step: dict(accuracies(line).values()) for step, line in read_metrics(run).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["sync", "colocate_async", "separate_async"], default="sync")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    slow = "actor_rollout_ref.rollout.max_num_seqs=6"  # so that responses are interrupted
    extra = [] if options.mode == "sync" else [f"mode={options.mode}", slow]
    if options.mode == "separate_async":
        extra.append("trainer.v1.separate_async.parameter_sync_step=2")  # x 4 problems a minibatch
    sweep = Sweep(options.folder, options.steps, extra)
    if options.mode == "sync" and sweep.run("unbroken") != 0:
        raise RuntimeError(f"the unbroken run failed: {options.folder}/unbroken.log")
    if options.steps <= options.kills:
        parser.error("--steps must be larger than --kills: no kill falls into the last step")
    seeded = random.Random(options.seed)
    moments = [Moment.drawn(seeded, options.steps, options.kills, starting=0.2) for _ in range(options.kills)]
    plan = list(zip(itertools.cycle(TARGETS), moments, strict=False))
    records = read_lines(sweep.results) if sweep.results.exists() else ()
    done = sum(record["kind"] == "kill" for record in records)
    for target, moment in plan[done:]:
        kill = sweep.kill_once("killed", target, moment)
        if kill["exit_status"] == 0:
            raise RuntimeError("the run was at its end before this kill: give more --steps")
        sweep.note(kill)
    if sweep.run("killed") != 0:
        raise RuntimeError(f"the resumed run failed: {options.folder}/killed.log")
    if options.mode != "sync":
        verdict = sweep.count("killed")
        sweep.note({**verdict, "mode": options.mode})
        complete = (
            verdict["responses"] == verdict["responses_wanted"] and verdict["problems"] == verdict["problems_wanted"]
        )
        even = verdict["whole_groups"] and verdict["rounds"][-1] - verdict["rounds"][0] <= 1
        return 0 if verdict["every_step_once"] and complete and even and not verdict["missing"] else 1
    verdict = sweep.compare("unbroken", "killed")
    sweep.note(verdict)
    return 0 if verdict["every_step_once"] and verdict["weights_differ"] <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
