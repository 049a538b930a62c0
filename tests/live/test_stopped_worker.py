"""A worker that is stopped while the run trains: the launcher says which and where, ends the run, and it goes on."""

import signal
import subprocess
import time

import pytest
from kill_sweep import TARGETS, Sweep, processes
from leftovers import leftovers

from cppo_verl.checkpoint import retention
from cppo_verl.run.log import read_lines

pytestmark = [pytest.mark.live, pytest.mark.slow]


@pytest.mark.parametrize(("target", "named"), [("actor worker", "actor worker 0"), ("vLLM server", "vLLM server")])
def test_a_stopped_worker_ends_the_run_and_is_named(tmp_path, target, named):
    sweep = Sweep(tmp_path, steps=4, extra=["run.name=r", "run.stall_minutes=2"])
    run = tmp_path / "r"
    with open(tmp_path / "shown", "w") as shown:
        launcher = subprocess.Popen(sweep.command, stdout=shown, stderr=shown)
        try:
            sweep._wait_for(lambda: retention.complete_steps(run / "checkpoints"), launcher)
            for process in processes(run, TARGETS[target]):
                process.send_signal(signal.SIGSTOP)
            stopped = time.time()
            status = launcher.wait(timeout=600)
        finally:
            launcher.kill()
    text = (tmp_path / "shown").read_text()
    assert status == 124, text
    assert 120 <= time.time() - stopped < 240
    assert "Stalled: no progress for 2 minutes in " in text
    assert f"{named} (process " in text
    assert "is stopped by a signal" in text
    stacks = (run / "logs/train-1.progress/stacks.txt").read_text()
    assert "== driver" in stacks
    assert 'File "' in stacks
    assert leftovers(run) == []
    kept = retention.complete_steps(run / "checkpoints")
    assert kept
    assert subprocess.call([*sweep.command, "run.stall_minutes=60"]) == 0
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert set(kept) <= set(retention.complete_steps(run / "checkpoints"))
