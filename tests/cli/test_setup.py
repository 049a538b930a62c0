"""The set-up script: quick when nothing is to do, and clear when it cannot go on."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest
import tomllib

SETUP = Path(__file__).parents[2] / "scripts" / "setup.sh"


def setup(*arguments, **environment):
    return subprocess.run(
        ["bash", SETUP, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def test_nothing_to_do_takes_no_time():
    stack = Path(sys.prefix, ".cppo-stack")
    # Set up from here, another checkout's environment would become this one's.
    if not stack.exists() or Path(sys.prefix).parent != SETUP.parents[1]:
        pytest.skip("this environment was not made by scripts/setup.sh of this checkout")
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
    assert "needs Python 3.11.5 to 3.12" in done.stderr
    assert "PYTHON=" in done.stderr


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = setup("cpu", VENV=str(tmp_path))
    assert done.returncode == 1
    assert "is not empty and no Python environment: set VENV to another folder" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_path_with_spaces(tmp_path):
    """Ray's processes would never start, without a word."""
    done = setup("cpu", VENV=str(tmp_path / "my venv"))
    assert done.returncode == 1
    assert "setup: Ray starts no process from a path with spaces in it" in done.stderr
    assert not (tmp_path / "my venv").exists()


def test_a_checkout_that_cannot_be_written(tmp_path):
    """Mounted read-only, which stops root as well."""
    checkout = tmp_path / "checkout"
    shutil.copytree(SETUP.parent, checkout / "scripts")
    (checkout / "pyproject.toml").touch()
    mounted = f"mount --bind {checkout} {checkout} && mount -o remount,ro,bind {checkout}"
    namespace = ["unshare", "--mount", "bash", "-c"]
    if subprocess.run([*namespace, mounted], capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    done = subprocess.run(
        [*namespace, f"{mounted} && bash {checkout}/scripts/setup.sh cpu"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 1
    assert f"setup: {checkout} cannot be written, and installing cppo_verl from it writes there" in done.stderr


def test_nothing_diverts_it(tmp_path):
    """Variables with which pip or uv would install somewhere else, or something else."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    python = venv / "bin" / "python"
    python.write_text('#!/bin/bash\nenv >>"$0.environment"\n[[ $* != *install* ]]\n')
    python.chmod(0o755)
    diverting = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "UV_TARGET", "UV_PREFIX", "UV_SYSTEM_PYTHON", "UV_OVERRIDE")
    others = {name: str(tmp_path / "elsewhere") for name in diverting}
    done = setup("gpu", VENV=str(venv), PYTHON=sys.executable, PATH="/usr/bin:/bin", PIP_USER="1", **others)
    assert done.returncode == 1
    assert "failed at: uv" in done.stderr
    seen = Path(f"{python}.environment").read_text().splitlines()
    assert "PIP_USER=0" in seen
    assert not [line for line in seen if line.startswith(diverting)]


def test_what_is_installed_has_its_bytecode():
    """Without it an import takes twice as long, for ever where PYTHONDONTWRITEBYTECODE is set."""
    for package in ("torch", "transformers", "verl", "vllm", "ray"):
        source = find_spec(package).origin
        assert Path(cache_from_source(source)).is_file(), source


def test_every_locked_package_has_hashes():
    for name in ("cpu", "gpu", "flash_attn"):
        entries = re.split(r"\n(?=\w)", (SETUP.parent / "requirements" / f"{name}.lock").read_text())
        assert len(entries) > (200 if name != "flash_attn" else 0)
        assert [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []


def test_the_locks_hold_what_the_project_asks_for():
    """What pyproject.toml and the lists pin exactly is in the lock in that version."""
    requirements = SETUP.parent / "requirements"
    project = tomllib.loads((SETUP.parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    for stack in ("cpu", "gpu"):
        locked = {
            name.lower().replace("_", "-"): version
            for name, version in re.findall(r"^([\w.-]+)==(\S+)", (requirements / f"{stack}.lock").read_text(), re.M)
        }
        listed = (requirements / f"{stack}.txt").read_text().splitlines()
        pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", "\n".join([*project, *listed]), re.MULTILINE))
        assert len(pinned) > 5
        if stack == "cpu":
            assert pinned.pop("torch") in SETUP.read_text()  # its CPU build is in no lock
        assert {name: locked.get(name.lower().replace("_", "-")) for name in pinned} == pinned


@pytest.mark.slow
def test_the_gpu_stack_installs_from_the_lock(tmp_path):
    """What scripts/setup.sh gpu installs, flash-attn left out; and the seams hold on those official wheels."""
    free = shutil.disk_usage(tmp_path).free / 2**30
    if free < 25:
        pytest.skip(f"the GPU stack takes 10 GiB and its cache as much; {free:.0f} GiB are free")
    started = time.monotonic()
    environment = {
        **os.environ,
        "VENV": str(tmp_path / "venv"),
        "FLASH_ATTN": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }
    done = subprocess.run(["bash", SETUP, "gpu"], capture_output=True, text=True, timeout=1500, env=environment)
    said = done.stdout + done.stderr
    if "error sending request" in said or "Failed to fetch" in said:
        pytest.skip(f"no network: {said[-300:]}")
    assert done.returncode == 0, said
    assert "checking the seams to verl and vLLM" in said  # compat.check()
    print(f"{time.monotonic() - started:.0f} s, {said}")
    assert list(tmp_path.glob("venv/lib/python3.*/site-packages/vllm/v1/engine/__pycache__/async_llm.*.pyc"))
    python = tmp_path / "venv" / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "from importlib.metadata import version as v; print(v('verl'), v('vllm'), v('torch'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[:2] == ["0.9.1", "0.24.0"]
    assert found.stdout.split()[2].startswith("2.11.0")


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
        env={**os.environ, "VENV": str(venv), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
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
