"""The set-up script: quick when nothing is to do, and clear when it cannot go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup.sh"


def setup(*arguments, **environment):
    return subprocess.run(
        ["bash", SETUP, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def test_nothing_to_do_takes_no_time():
    stack = Path(sys.prefix, ".cppo-stack")
    if not stack.exists():
        pytest.skip("this environment was not made by scripts/setup.sh")
    started = time.perf_counter()
    done = setup(stack.read_text().strip(), VENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    assert "is up to date" in done.stdout
    assert time.perf_counter() - started < 5


def test_unknown_stack():
    done = setup("tpu")
    assert done.returncode == 2
    assert done.stderr == "usage: scripts/setup.sh [cpu|gpu]\n"


def test_one_environment_holds_one_stack(tmp_path):
    (tmp_path / ".cppo-stack").write_text("gpu\n")
    done = setup("cpu", VENV=str(tmp_path))
    assert done.returncode == 1
    assert "holds the gpu stack, whose vLLM excludes the cpu one; remove it, or set VENV" in done.stderr


def test_no_usable_python(tmp_path):
    """With an interpreter that is too old on the PATH and nothing else."""
    old = tmp_path / "bin" / "python3"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("python3.10", "python3.11", "python3.12"):
        (old.parent / name).symlink_to(old)
    done = setup("cpu", VENV=str(tmp_path / "venv"), PATH=f"{old.parent}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "needs Python 3.11 to 3.12" in done.stderr
    assert "PYTHON=" in done.stderr


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = setup("cpu", VENV=str(tmp_path))
    assert done.returncode == 1
    assert "is not empty and no Python environment: set VENV to another folder" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_ctrl_c_ends_it(tmp_path):
    """pip ends in order at SIGINT, after which bash would go on to the next thing."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    python = venv / "bin" / "python"
    # Answers --version; installs until it is interrupted, like pip.
    python.write_text(
        "#!/bin/bash\n"
        'echo "$@" >>"$0.calls"\n'
        "if [[ $* != *install* ]]; then exit $(( ${1:+0} )); fi\n"
        "trap 'exit 1' INT\n"
        "for _ in {1..300}; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", SETUP, "gpu"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "VENV": str(venv), "PYTHON": sys.executable},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background
    )
    calls = Path(f"{python}.calls")
    deadline = time.time() + 20
    while not (calls.exists() and " install " in calls.read_text()):
        assert time.time() < deadline, process.stdout.read()
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "flash-attn" not in said
    assert not (venv / ".cppo-setup").exists()
    assert calls.read_text().count(" install ") == 1
