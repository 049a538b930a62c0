"""The command itself: quick, quiet about tracebacks, the same from a wheel far from the checkout."""

import errno
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from cppo_verl.cli import main

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def cppo(*arguments, **kwargs):
    return subprocess.run([BIN / "cppo", *arguments], capture_output=True, text=True, timeout=120, **kwargs)


def test_help_answers_within_a_second():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        assert "train" in cppo("--help").stdout
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0


def test_help_imports_nothing_heavy():
    code = "import sys; from cppo_verl.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'verl', 'ray', 'hydra', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def overrides(live_assets, tmp_path):
    return ["recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}", "run.name=dry"]


def test_dry_run_prints_the_configuration_and_starts_nothing(overrides, tmp_path, capsys):
    assert main(["train", "--dry-run", *overrides, "method=dppo", "method.delta=0.3"]) == 0
    output = capsys.readouterr()
    assert "_target_: cppo_verl.methods.Dppo" in output.out
    assert "delta: 0.3" in output.out
    assert "nothing was started" in output.err
    assert not (tmp_path / "dry").exists()


def test_overrides_after_the_option_count(overrides, capsys):
    assert main(["train", *overrides, "--dry-run", "method=grpo", "+trainer.note=later"]) == 0
    assert "cppo_verl.methods.Grpo" in capsys.readouterr().out


@pytest.mark.alone
def test_a_refusal_is_short_and_fast(overrides):
    started = time.perf_counter()
    done = cppo("train", *overrides, "method.delta=-1", "method.w_min=0.5")
    assert time.perf_counter() - started < 15
    assert done.returncode == 2
    assert done.stderr == "cppo train: method.delta must be > 0; got -1.0\n"
    assert done.stdout == ""


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--dryrun"])
    assert "unrecognized arguments: --dryrun" in capsys.readouterr().err


def test_plot_of_something_else_is_refused(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because setuptools packs what an earlier build left behind in the checkout.
    tree = shutil.copytree(
        ROOT, folder / "tree", ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    )
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_config(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {name.removeprefix("cppo_verl/configs/") for name in names if name.startswith("cppo_verl/configs/")}
    assert packed == {
        str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*") if path.is_file()
    }
    web = {str(path.relative_to(ROOT)) for path in (ROOT / "cppo_verl/inspection/web").iterdir()}
    assert len(web) > 5
    assert {"cppo_verl/py.typed", "cppo_verl/bench/ratios.json", "cppo_verl/figures/paper.json", *web} <= set(names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cppo_verl").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_an_installed_wheel_composes_outside_the_checkout(wheel, overrides, tmp_path):
    """From the unpacked wheel in an empty folder, with the checkout's own package out of reach."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    code = (
        "import sys, cppo_verl; from cppo_verl.cli import main; print(cppo_verl.__file__); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--dry-run", *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(site))
    assert "_target_: cppo_verl.methods.Cppo" in done.stdout


def test_what_the_machine_lacks_is_one_line_and_what_is_unknown_keeps_its_traceback(monkeypatch, capsys):
    def failing(number):
        def train(**_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("cppo_verl.training.command.train", train)

    failing(errno.ENOSPC)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "cppo train: No space left on device\n"
    failing(errno.ECONNREFUSED)
    with pytest.raises(ConnectionRefusedError):
        main(["train"])
