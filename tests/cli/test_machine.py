"""Folders that cannot hold what Ray and vLLM write are refused before either starts."""

import os
import subprocess
from types import SimpleNamespace

import pytest

from cppo_verl.cli import main
from cppo_verl.config import check_machine
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.doctor.files import check_disk
from cppo_verl.doctor.findings import Subject
from cppo_verl.doctor.machine import check_shared_memory

MIB = 2**20


pytestmark = pytest.mark.usefixtures("nothing_starts")


@pytest.fixture
def base(live_assets, tmp_path):
    return ["platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}"]


@pytest.fixture
def sizes(monkeypatch):
    """Folder -> (MiB in all, MiB free) of the file systems that are not as they are."""
    sizes, real = {}, check_machine.shutil.disk_usage

    def usage(path):
        if str(path) not in sizes:
            return real(path)
        total, free = (MIB * size for size in sizes[str(path)])
        return SimpleNamespace(total=total, free=free, used=total - free)

    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return sizes


@pytest.mark.parametrize(("size", "told"), [((64, 64), "64 MiB in all"), ((24000, 3), "3 MiB free")])
def test_a_small_or_full_dev_shm_is_refused_before_ray_starts(base, sizes, size, told, capsys):
    sizes["/dev/shm"] = size
    assert main(["train", *base]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cppo train: /dev/shm: {told}, and vLLM and Ray take 256 or more: docker run --shm-size=8g")
    assert [finding.status for finding in check_shared_memory(None)] == ["FAIL"]
    absent = validate(configuration.compose(base), planned=True)  # a dry run is for another machine
    assert [problem.key for problem in absent] == ["/dev/shm"]
    validate(configuration.compose([*base, "ray_kwargs.ray_init.address=auto"]))


def test_a_full_temporary_folder_is_refused(base, sizes, tmp_path, monkeypatch, capsys):
    for name in ("TMPDIR", "RAY_TMPDIR"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
        sizes[str(folder)] = (1000, 5)
    assert main(["train", *base]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("=")[0] for line in lines] == ["cppo train: TMPDIR", "cppo train: RAY_TMPDIR"]
    assert "5 MiB free, and a run takes 256 or more; make room, or set TMPDIR=/a/short/path/elsewhere" in lines[0]
    assert "FAIL" in [finding.status for finding in check_disk(Subject(configuration.compose(base), described=False))]


def test_a_temporary_folder_that_is_none_is_refused(sizes, tmp_path, monkeypatch):
    """Python takes another one without a word; other programs do not."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    (problem,) = check_machine.check_temporary()
    assert problem.text.startswith(f"TMPDIR={tmp_path}/gone: no folder that can be written; set TMPDIR=")


def test_a_temporary_folder_from_which_nothing_can_be_loaded_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "noexec"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m,noexec", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        flags = os.statvfs(tmp_path).f_flag | os.ST_NOEXEC
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    try:
        monkeypatch.setenv("TMPDIR", str(folder))
        (problem,) = check_machine.check_temporary()
        assert "mounted noexec, and compiled code is loaded from there; set TMPDIR=" in problem.text
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)
