"""A run that does not get on ends, and says in what it hangs; one that gets on slowly does not."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from cppo_verl.cli import main
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.run.log import METRICS, read_lines
from cppo_verl.run.progress import PROGRESS, SIGNAL, Progress, counting, last_thread
from cppo_verl.run.stall import Stalled, Watch
from cppo_verl.run.supervisor import STALLED, supervise
from cppo_verl.training import launcher
from cppo_verl.training.display import RunDisplay


def follow(folder, stall, limit=0.6):
    """(exit status, seconds) of a run that hangs in ``stall``, as ``cppo train`` follows it."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    log = folder / "logs/train-1.log"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "STALL": stall, "PYTHONPATH": path}
    display, started = RunDisplay(folder, log), time.time()
    status = supervise("stalling", folder, log, environment, folder / METRICS, display, limit)
    if status:
        display.failure(status)
    return status, time.time() - started


def left(folder):
    """Processes that carry the run's name still."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(PROGRESS, "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("stall", "told"),
    [
        ("generation", "in generation: driver"),
        ("update", "in update: driver"),
        ("actor worker 0:update", "in update: actor worker 0"),
        ("weight sync", "in weight sync: driver"),
        ("agent loop worker:queue", "in queue: agent loop worker"),
        ("stopped", "in generation: vLLM server"),
    ],
)
def test_a_run_that_hangs_ends_with_phase_worker_and_stack(tmp_path, stall, told, capsys):
    status, seconds = follow(tmp_path, stall)
    output = capsys.readouterr().out
    assert status == STALLED
    assert seconds < 20
    assert "the run failed (exit status 124)" in output
    assert f"Stalled: no progress for 0.01 minutes {told} (process " in output
    if stall == "stopped":
        assert "is stopped by a signal (kill -CONT lets it go on)" in output
    else:
        assert "hang_in_the_update (" in output
        assert "stalling.py:" in output
    assert "Checkpoints are intact: run.resume=true continues" in output
    assert "hang_in_the_update" in (tmp_path / "logs/train-1.progress/stacks.txt").read_text()
    *_, last = read_lines(tmp_path / "events.jsonl")
    assert (last["event"], last["error"]) == ("failed", "Stalled")
    assert (tmp_path / "checkpoints/global_step_1").is_dir()
    assert left(tmp_path) == []


def test_a_background_job_ends_in_order_too(tmp_path):
    """A shell starts it with SIGINT ignored, which its processes inherit; the driver was killed after 15 seconds."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status, seconds = follow(tmp_path, "generation")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert status == STALLED
    assert "KeyboardInterrupt" in (tmp_path / "logs/train-1.log").read_text()
    assert seconds < 10


def test_an_evaluation_is_watched_as_its_run_was_and_says_what_is_kept(live_assets, tmp_path, monkeypatch, capsys):
    asked = []

    def hanging(module, folder, log, environment, lines, display, stall, kept):
        asked.append(stall)
        variables = {**environment, "STALL": "loading the model", "PYTHONPATH": str(Path(__file__).parent)}
        return supervise("stalling", folder, log, variables, lines, display, 0.6, kept)

    monkeypatch.setattr("cppo_verl.evaluation.command.supervise", hanging)
    data, out = live_assets / "heldout.parquet", tmp_path / "evaluation"
    command = ["eval", str(live_assets / "model"), "--data", str(data), "--max-tokens", "16", "--out", str(out)]
    assert main(command) == STALLED
    assert asked == [3600]
    output = capsys.readouterr().out
    assert "Stalled: no progress for 0.01 minutes in loading the model: driver (process " in output
    assert "what was sampled is kept; the same command goes on from there" in output
    assert "Checkpoints are intact" not in output


def test_a_run_that_gets_on_slowly_is_left_alone(tmp_path):
    assert follow(tmp_path, "nothing", limit=0.8)[0] == 0


def test_a_limit_of_null_watches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS, str(tmp_path / "of another run"))
    assert follow(tmp_path, "nothing", limit=None)[0] == 0
    assert not (tmp_path / "logs/train-1.progress").exists()
    assert not (tmp_path / "of another run").exists()


def said(folder, **changes):
    content = {"worker": "driver", "host": "elsewhere", "pid": os.getpid(), "phase": "update", "done": 1, "doing": {}}
    content |= changes
    (folder / f"{content['worker']}.json").write_text(json.dumps(content))


def test_only_what_is_finished_is_progress(tmp_path, monkeypatch):
    """A driver that asks the queue again and again, and a response that is under way, have got nowhere."""
    now = [100.0]
    monkeypatch.setattr("cppo_verl.run.stall.time.monotonic", lambda: now[0])
    said(tmp_path)
    watch = Watch(tmp_path, 60)

    def minute(**changes):
        said(tmp_path, **changes)
        for _ in range(31):
            now[0] += 2
            watch.check()

    watch.check()
    for done in (2, 3, 4):
        minute(done=done)
    minute(done=4, phase="weight sync")
    watch.moved()
    with pytest.raises(Stalled, match="in weight sync: driver"):
        minute(done=4, phase="weight sync", doing={"queue": time.time()})


def test_a_launcher_that_slept_gives_the_run_its_time_again(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cppo_verl.run.stall.time.monotonic", lambda: now[0])
    said(tmp_path)
    watch = Watch(tmp_path, 60)
    now[0] += 1
    watch.check()
    now[0] += 3600
    watch.check()

    def minute():
        for _ in range(31):
            now[0] += 2
            watch.check()

    with pytest.raises(Stalled):
        minute()


def test_no_process_but_the_runs_own_gets_the_signal(tmp_path, monkeypatch):
    """A process id may have another owner by now, whom the signal would end."""
    (tmp_path / "driver.stacks").touch()
    said(tmp_path, host=socket.gethostname())
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    watch = Watch(tmp_path, 0.0)
    watch._seen = {worker.file: (worker.phase, worker.done) for worker in watch._workers()}
    with pytest.raises(Stalled, match=r"driver .* does not answer"):
        watch.check()


def test_a_torn_progress_file_is_read_at_the_next_look(tmp_path):
    (tmp_path / "x.json").write_text('{"worker": "dri')
    assert Watch(tmp_path, 60)._workers() == []


def test_progress_is_what_has_changed_in_the_queue(monkeypatch):
    progress, stored = Progress(), [0]
    monkeypatch.setattr("cppo_verl.run.progress._here", progress)
    read = counting(lambda: None, lambda: stored[0])
    read()
    before = progress.state()["done"]
    for _ in range(5):
        read()
    assert progress.state()["done"] == before
    stored[0] = 3
    read()
    assert progress.state() == {"phase": "", "done": before + 1, "doing": {}}
    stuck = counting(lambda: observed.append(progress.state()["doing"]), lambda: 0)
    observed = []
    stuck()
    assert list(observed[0]) == ["queue"]


def test_the_innermost_frames_of_the_main_thread():
    text = (
        "Thread 0x1 (most recent call first):\n"
        '  File "/a/threading.py", line 7 in wait\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/a/torch.py", line 1 in all_reduce\n  File "/a/fsdp.py", line 2 in step\n'
    )
    assert last_thread(text) == ["all_reduce (/a/torch.py:1)", "step (/a/fsdp.py:2)"]
    assert last_thread("") == []


def test_the_signal_is_not_the_lifelines():
    assert SIGNAL != signal.SIGUSR1


@pytest.mark.parametrize("value", ["0", "-5", "soon", "true", ".inf", "[1]"])
def test_a_limit_that_cannot_pass_is_refused(live_assets, tmp_path, value):
    base = ["platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}"]
    with pytest.raises(configuration.ConfigError, match=r"run.stall_minutes=.*: give minutes without progress"):
        validate(configuration.compose([*base, f"run.stall_minutes={value}"]))


@pytest.mark.parametrize(("value", "seconds"), [("60", 3600), ("0.5", 30), ("null", None)])
def test_the_launcher_hands_the_limit_on(live_assets, tmp_path, monkeypatch, value, seconds):
    given = []
    monkeypatch.setattr(launcher, "supervise", lambda *arguments: given.append(arguments[-1]) or launcher.INTERRUPTED)
    base = ["platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}"]
    launcher.launch(configuration.compose([*base, f"run.stall_minutes={value}"]), ["cppo", "train"])
    assert given == [seconds]
