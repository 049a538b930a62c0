"""A stand-in for the training process, which a test has hang: ``python -m stalling RUN_FOLDER``.

STALL in its environment says in what: a phase of the driver's own ("update"), a part of a worker's ("worker:queue"), a
worker that is stopped by a signal ("stopped"), or "nothing": it works on for a while and ends.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cppo_verl.run import lifeline, progress
from cppo_verl.run.log import RunLog


def hang_in_the_update():
    time.sleep(60)


def main(folder, role="driver"):
    if role == "driver":
        lifeline.heed()
    progress._INTERVAL = 0.05
    progress.report(role)
    if role != "driver":
        with progress.doing(os.environ["STALL"].partition(":")[2] or "generation"):
            hang_in_the_update()
    log, stall = RunLog(folder), os.environ["STALL"]
    log.event("initialized", step=0, total_steps=1)
    if stall == "nothing":
        progress.phase("generation")
        for _ in range(30):  # a response now and then
            time.sleep(0.05)
            progress.advance()
        log.event("finished")
        return
    checkpoint = Path(folder) / "checkpoints/global_step_1"
    checkpoint.mkdir(parents=True)
    progress.phase("generation" if stall == "stopped" else stall.partition(":")[0])
    if stall == "stopped" or ":" in stall:
        name = "vLLM server" if stall == "stopped" else stall.partition(":")[0]
        worker = subprocess.Popen([sys.executable, "-m", "stalling", folder, name])
        while stall == "stopped" and not list(Path(os.environ[progress.PROGRESS]).glob(f"*-{worker.pid}.json")):
            time.sleep(0.05)
        if stall == "stopped":
            worker.send_signal(signal.SIGSTOP)
    hang_in_the_update()


if __name__ == "__main__":
    main(*sys.argv[1:])
