"""The set-up script: quick when nothing is to do, and clear when it cannot go on."""

import os
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
    assert done.stderr == (
        "setup: the cpu stack needs Python 3.11 to 3.12 (tested: 3.11); set PYTHON=/path/to/python\n"
    )
