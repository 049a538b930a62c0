"""What a failed run shows first: the cause that Ray or vLLM has logged, not the exception that only points to it.

The texts are those of Ray 2.60, vLLM 0.27 and torch 2.13, in the order and with the prefixes in which they log them.
"""

import io

import pytest
from rich.console import Console

from cppo_verl.run.causes import first_errors, is_following
from cppo_verl.run.failure import Failure

DEAD = ("EngineDeadError", "EngineCore encountered an issue. See stack trace (above) for the root cause.")
DIED = (
    "ActorDiedError",
    "The actor died unexpectedly before finishing this task.\n\tclass_name: TopKServer\n\tpid: 71",
)
START = (
    "RuntimeError",
    "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
)


def worker(text):
    """As Ray prints a vLLM server's output."""
    return "".join(f"\x1b[36m(TopKServer pid=5399)\x1b[0m {line}\n" for line in text.splitlines())


def engine(text, message="EngineCore encountered a fatal error.", line="core.py:1351"):
    """As vLLM's engine logs an exception, in its server's output."""
    lines = [message, "Traceback (most recent call last):", '  File "/x/core.py", line 9, in run_engine_core', *text]
    return worker("\n".join(f"(EngineCore pid=5410) ERROR 11-25 10:00:00 [{line}] {part}" for part in lines))


def passed_on(error):
    """What a server and the driver add."""
    return worker(f"vllm.v1.engine.exceptions.{error[0]}: {error[1]}") + f"{error[0]}: {error[1]}\n"


def shown(folder, log, event):
    (folder / "log").write_text(log)
    failure = Failure(folder / "log")
    if event:
        failure.note({"event": "failed", "error": event[0], "message": event[1]})
    output = io.StringIO()
    failure.show(Console(file=output, width=200), "the run", 1)
    return output.getvalue()


SMALL_SHM = engine(
    ["RuntimeError: unable to write to file </torch_5410_1_0>: No space left on device (28)"],
)
CASES = {
    "torch in a small /dev/shm": (SMALL_SHM, DEAD, "cause: /dev/shm is full or too small; docker run --shm-size=8g"),
    "vLLM's message queue in a small /dev/shm": (
        engine(["OSError: [Errno 28] No space left on device: '/psm_3f1a2b'"], "EngineCore failed to start."),
        START,
        "cause: /dev/shm is full or too small",
    ),
    "a bus error": (
        worker("Fatal Python error: Bus error\n\nThread 0x00007f (most recent call first):"),
        DIED,
        "cause: /dev/shm is full or too small",
    ),
    "NCCL in a small /dev/shm": (
        worker("Error while creating shared memory segment /dev/shm/nccl-Xy12Zk (size 9637888), error: No space left"),
        DEAD,
        "cause: /dev/shm is full or too small",
    ),
    "a TMPDIR mounted noexec": (
        engine(["ImportError: /scratch/torchinductor_u/ab/cab.so: failed to map segment from shared object"]),
        DEAD,
        "cause: /scratch/torchinductor_u/ab/cab.so: code cannot be loaded from there, its file system is mounted "
        "noexec; set TMPDIR=/a/path/elsewhere",
    ),
    "a full TMPDIR": (
        engine(["OSError: [Errno 28] No space left on device: '/scratch/torchinductor_u/ab'"]),
        DEAD,
        "cause: the disk of /scratch/torchinductor_u/ab is full; make room, or set TMPDIR",
    ),
    "a full disk without a name": (
        engine(["OSError: [Errno 28] No space left on device"]),
        DEAD,
        "cause: the disk is full; make room",
    ),
    "a GPU's memory": (
        engine(["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB in all."]),
        DEAD,
        "cause: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB in all.",
    ),
    "the machine's memory": (
        engine(["RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."]),
        DEAD,
        "cause: the memory of the machine is used up; give the run more memory, or less to do",
    ),
    "the kernel's out-of-memory killer": (
        worker(f"{START[0]}: {START[1]}".replace("': 1", "': -9")),
        DIED,
        "cause: vLLM's engine was killed (SIGKILL), as the kernel does where memory runs out (see dmesg)",
    ),
    "a machine too busy for Ray": (
        "Exception: The current node timed out during startup. This could happen because some of the raylet failed to "
        "startup or the GCS has become overloaded.\n",
        ("Exception", "The current node timed out during startup."),
        "cause: Ray's helper processes were not up within its 15 seconds, as where other programs keep every core busy",
    ),
    "Ray's": (
        "(raylet) 1 worker(s) were killed due to the node running low on memory. Refer to the documentation on how to "
        "address the out of memory issue: https://docs.ray.io/en/latest/x.html.\n",
        DIED,
        "cause: Ray ended a worker because the memory of its machine was nearly full; give the run more",
    ),
    "an exception that no table knows": (
        engine(["ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired"])
        + worker(f"RuntimeError: {START[1]}"),
        START,
        "cause: ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_shown_first(tmp_path, name):
    log, event, told = CASES[name]
    lines = shown(tmp_path, "a line\n" + log + passed_on(event), event).strip().splitlines()
    assert lines[0].startswith("the run failed")
    assert lines[1].startswith(told)
    assert sum(line.startswith("cause: ") for line in lines) == 1
    assert len(lines) <= 9


def test_a_process_that_ended_without_a_word_has_a_cause_too(tmp_path):
    assert "\ncause: /dev/shm is full" in shown(tmp_path, SMALL_SHM, None)


def test_an_event_that_names_its_cause_is_left_to_speak(tmp_path):
    """The checkpoint's own message says more of a full disk."""
    message = "the checkpoint x could not be written and was removed (OSError: [Errno 28] No space left on device)"
    output = shown(tmp_path, "OSError: [Errno 28] No space left on device: '/y'\n", ("OSError", message))
    assert "cause:" not in output


def test_an_ordinary_error_has_no_cause_but_itself(tmp_path):
    log = worker("ValueError: the reward is broken")
    output = shown(tmp_path, log, ("RuntimeError", "no trajectories"))
    assert "cause:" not in output
    assert "earlier: ValueError: the reward is broken (1x)" in output


def test_what_only_passes_an_error_on_comes_last(tmp_path):
    (tmp_path / "log").write_text(
        passed_on(DEAD) + "ray.exceptions.ActorDiedError: The actor died.\n\tclass_name: TopKServer\n" + SMALL_SHM
    )
    errors = [error for error, _ in first_errors(tmp_path / "log", limit=9)]
    assert errors[0].startswith("RuntimeError: unable to write to file")
    assert all(map(is_following, errors[1:]))
    assert any("(class_name: TopKServer)" in error for error in errors)
