"""What ends weights and responses on their way: does a run end with a cause, and go on afterwards?

    python tests/live/fault_sweep.py FOLDER [--only NAME]

A run with ``mode=separate_async`` for each fault: weights that cannot be sent, cannot be received, are not taken by the
server or never come (faulty_weights.py); the queue's storage, its controller and an agent loop worker killed after the
first step. Each has to end by itself, name its cause in the terminal and leave no process; resumed without the fault,
every step has to be there once.
FOLDER/result.jsonl gets a line for each (seconds_to_end: from the kill, else from the start). Given again after an
interruption, the command goes on with those left.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from faulty_weights import PLANTED
from kill_sweep import Sweep, processes

from cppo_verl.run.log import read_lines, read_metrics

STEPS = 4


class Fault(NamedTuple):
    said: str
    """What the terminal has to name, as a pattern."""
    engine: str | None = None
    """Of verl's registry of checkpoint engines."""
    killed: str | None = None
    """Of the command line of a process."""


FAULTS = {
    "weights are not sent": Fault(PLANTED, engine="faulty_send"),
    "weights are not received": Fault(PLANTED, engine="faulty_receive"),
    "a server does not take the weights": Fault("the vLLM server did not take the new weights", engine="faulty_shape"),
    "weights never come": Fault("no progress for 2 minutes in weight sync", engine="faulty_silence"),
    "the queue's storage is killed": Fault("the queue's storage unit 0 is dead", killed="ray::SimpleStorageUnit"),
    "the queue's controller is killed": Fault("the queue's controller is dead", killed="ray::TransferQueueController"),
    # Ray says it first where the next prompts are just being submitted.
    "an agent loop worker is killed": Fault("agent.loop.worker.0", killed="ray::TrustRegionAgentLoopWorker"),
}


def plant(folder: Path, name: str) -> dict:
    fault = FAULTS[name]
    run_name = re.sub(r"\W+", "-", name)
    sweep = Sweep(
        folder,
        STEPS,
        [
            *("mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=2", "run.stall_minutes=2"),
            f"run.name={run_name}",
        ],
    )
    faulty = []
    if fault.engine:
        engine = "actor_rollout_ref.rollout.checkpoint_engine"
        faulty = [f"{engine}.backend={fault.engine}", f"{engine}.custom_backend_module=faulty_weights"]
    run = folder / run_name
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    shown = folder / f"{run_name}.log"
    with open(shown, "w") as log:
        launcher = subprocess.Popen([*sweep.command, *faulty], stdout=log, stderr=log, env=environment)
        began = time.time()
        try:
            if fault.killed:
                sweep._wait_for(lambda: read_metrics(run) if run.exists() else (), launcher)
                victims = processes(run, fault.killed)
                assert victims, f"no process {fault.killed}"
                for process in victims:
                    process.send_signal(signal.SIGKILL)
                began = time.time()
            status = launcher.wait(timeout=900)
            seconds = time.time() - began
        finally:
            launcher.kill()
    time.sleep(15)  # the grace of processes whose launcher is gone
    text = shown.read_text()
    cause = [line.strip() for line in text.splitlines() if re.search(fault.said, line)][:2]
    record = {
        **{"kind": "fault", "fault": name, "exit_status": status, "seconds_to_end": round(seconds, 1), "said": cause},
        **{"steps_before": len(read_metrics(run)), "processes_left": len(processes(run, ""))},
    }
    with open(shown, "a") as log:
        record["resumed"] = subprocess.call(sweep.command, stdout=log, stderr=log)
    record["steps"] = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    sweep.note(record)
    return record


def is_right(record: dict) -> bool:
    ended = record["exit_status"] != 0 and record["said"] and not record["processes_left"]
    return bool(ended) and record["resumed"] == 0 and record["steps"] == list(range(1, STEPS + 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=FAULTS, help="this fault alone")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "result.jsonl"
    records = {line["fault"]: line for line in read_lines(results)} if results.exists() else {}
    for name in FAULTS:
        if name not in records and options.only in (None, name):
            records[name] = plant(folder, name)
    return 0 if all(map(is_right, records.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
