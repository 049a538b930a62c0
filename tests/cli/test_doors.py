"""Who else can read a run, reach its ports or have code run by it: nobody by default."""

import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from cppo_verl.adapters import store
from cppo_verl.adapters.store import rendezvous
from cppo_verl.checkpoint.find import Checkpoint, CheckpointError
from cppo_verl.checkpoint.trust import OWN_REWARD, check_trust
from cppo_verl.cli import main
from cppo_verl.config import compose as configuration
from cppo_verl.evaluation.samples import Evaluation, Question, content_hashes
from cppo_verl.run.folder import foreign
from cppo_verl.run.supervisor import locked, process_environment, start
from cppo_verl.training.launcher import environment


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def plain_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_run_folder_and_what_is_written_into_it_are_the_users_alone(tmp_path, plain_umask):
    folder = tmp_path / "runs" / "mine"
    with locked(folder) as free:
        assert free
        (folder / "config.yaml").touch()
    assert mode(folder) == 0o700
    assert mode(folder / "config.yaml") == mode(folder / ".lock") == 0o600
    (tmp_path / "after").touch()
    assert mode(tmp_path / "after") == 0o644
    assert mode(tmp_path / "runs") == 0o755  # others have their runs there


def test_so_are_the_files_of_its_processes_and_rays_token(tmp_path, plain_umask, monkeypatch):
    """Ray writes the token with the umask that it finds."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of an earlier Ray")
    (tmp_path / "written.py").write_text("import sys; open(sys.argv[1], 'w')")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with open(tmp_path / "log", "wb") as log:
        assert start("written", [str(tmp_path / "file")], log, variables).wait() == 0
    assert mode(tmp_path / "file") == 0o600
    assert mode(tmp_path / ".ray" / "auth_token") == 0o600


LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}


@pytest.fixture
def no_choice(monkeypatch):
    for name in (*LOOPBACK, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_on_one_machine_opens_nothing_to_others(no_choice, monkeypatch):
    assert process_environment(True, "model").items() >= LOOPBACK.items()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert process_environment(False, "model")["GLOO_SOCKET_IFNAME"] == "eth1"


@pytest.mark.parametrize("given", ["setting", "environment"])
def test_a_run_on_several_nodes_is_reached_from_them(no_choice, monkeypatch, live_assets, tmp_path, given):
    base = ["recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}", "run.name=new"]
    if given == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    else:
        base.append("ray_kwargs.ray_init.address=10.0.0.1:6379")
    assert not LOOPBACK.keys() & environment(configuration.compose(base)).keys()


def test_ray_takes_the_loopback_for_its_node():
    """The switch is Ray's own, for systems without clusters: another release may read it otherwise."""
    script = "from ray._private.services import get_node_ip_address; print(get_node_ip_address())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **LOOPBACK}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() in (["127.0.0.1"], ["::1"])


def listening():
    """Port -> address of every socket that this process listens on."""
    found = psutil.Process().net_connections("tcp")
    return {connection.laddr.port: connection.laddr.ip for connection in found if connection.status == "LISTEN"}


def meet(method, monkeypatch):
    """Address on which a group of one meets itself, made as init_process_group makes it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"tcp://127.0.0.1:{port}" if method == "tcp" else "env://"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    met, rank, size = next(rendezvous.rendezvous(url, 0, 1, timeout=timedelta(seconds=10)))
    met.set("a", "b")
    assert (met.get("a"), rank, size) == (b"b", 0, 1)
    return listening()[port]


@pytest.mark.parametrize("method", ["env", "tcp"])
def test_ranks_meet_on_their_host_only(monkeypatch, method):
    monkeypatch.setattr(rendezvous, "_create_c10d_store", store._create)
    assert meet(method, monkeypatch) in ("::", "0.0.0.0")  # torch's own way
    store.listen_on_its_host()
    assert meet(method, monkeypatch) == "127.0.0.1"


def test_a_process_that_listens_there_already_shares_its_store(monkeypatch):
    monkeypatch.setattr(rendezvous, "_create_c10d_store", store._create_on_host)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    make = [rendezvous._create_c10d_store("127.0.0.1", port, 0, 1, timedelta(seconds=10)) for _ in range(2)]
    make[0].set("a", "b")
    assert make[1].get("a") == b"b"


# What may run code


def run_folder(folder, **settings):
    """A run's folder that names itself, with a checkpoint of verl's shards."""
    folder.mkdir(parents=True)
    config = {
        "run": {"dir": str(folder.parent), "name": folder.name},
        "actor_rollout_ref": {"model": {"trust_remote_code": False}, "rollout": {"val_kwargs": {}}},
        "reward": {"custom_reward_function": {"path": OWN_REWARD}},
        **{node: {} for node in ("data", "trainer", "method", "divergence")},
    }
    for key, value in settings.items():
        OmegaConf.update(config := OmegaConf.create(config), key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / "manifest.json").write_text('{"attempts": []}')
    actor = folder / "checkpoints" / "global_step_1" / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    (actor.parent / "complete.json").write_text('{"step": 1, "metrics": {}}')
    return folder


@pytest.fixture
def moved(tmp_path):
    """A run that was made elsewhere, as a colleague's or one from the network."""
    return run_folder(tmp_path / "there" / "run").rename(tmp_path / "run")


def test_what_is_where_it_was_made_is_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    assert foreign(tmp_path, tmp_path / "link") is None
    assert foreign(tmp_path, "/elsewhere") == "was made as /elsewhere"
    assert foreign(tmp_path, None) == "does not say where it was made"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert foreign(tmp_path, tmp_path) == f"belongs to another user (uid {tmp_path.stat().st_uid})"


@pytest.mark.parametrize("command", ["merge", "eval"])
def test_shards_of_somebody_else_are_not_unpickled_unasked(moved, capsys, command):
    """With --trust, and where the run was made, the shards are looked at: there are none."""
    assert main([command, str(moved)]) == 2
    message = capsys.readouterr().err
    assert message == (
        f"cppo {command}: CHECKPOINT: {moved} was made as {moved.parent}/there/run, and using it runs code that comes "
        "with it (verl's shards are pickles); give --trust if you trust who made it\n"
    )


@pytest.mark.parametrize("arguments", [["moved", "--trust"], ["own"]])
def test_trusted_shards_are_looked_at(moved, tmp_path, capsys, arguments):
    run_folder(tmp_path / "own")
    name, *option = arguments
    assert main(["merge", str(moved if name == "moved" else tmp_path / name), *option]) == 2
    assert "is incomplete: model_world_size_1_rank_0.pt missing" in capsys.readouterr().err


def test_the_model_code_and_the_reward_function_of_a_run_are_code_too(tmp_path):
    settings = {
        "reward.custom_reward_function.path": "/x/reward.py",
        "actor_rollout_ref.model.trust_remote_code": True,
    }
    run = run_folder(tmp_path / "there" / "run", **settings).rename(tmp_path / "run")
    whole = run / "checkpoints" / "global_step_1" / "merged"
    whole.mkdir()
    (whole / "config.json").touch()
    (whole / "model.safetensors").touch()
    checkpoint = Checkpoint(str(whole), whole, "merged", 1, run)
    assert checkpoint.backend is None
    config = OmegaConf.load(run / "config.yaml")
    wanted = r"trust_remote_code=true, the reward function /x/reward.py\); give --trust"
    with pytest.raises(CheckpointError, match=wanted):
        check_trust(checkpoint, config, trusted=False)
    check_trust(checkpoint, config, trusted=True)
    check_trust(checkpoint, None, trusted=False)  # weights alone


def test_shards_that_lie_in_no_run_may_be_anybodys(tmp_path, capsys):
    actor = run_folder(tmp_path / "run").joinpath("checkpoints", "global_step_1", "actor").rename(tmp_path / "actor")
    assert main(["merge", str(actor)]) == 2
    assert f"{actor} does not say where it was made, and using it runs code" in capsys.readouterr().err


def evaluation(folder, named, reward):
    folder.mkdir()
    question = Question("x", "0", [{"role": "user", "content": "1+1?"}], "2")
    settings = {
        "model": {"source": "/m", "name": "m", "sha256": "a"},
        "questions": content_hashes([question]),
        "decoding": {"n": 1},
        "chat": {"arguments": {}, "template_sha256": "b"},
        "reward": {"path": str(reward), "name": "score", "kwargs": {}},
    }
    (folder / "manifest.json").write_text(json.dumps({**named, "settings": settings, "attempts": []}))
    (folder / "questions.jsonl").write_text(json.dumps(asdict(question)) + "\n")
    return folder


@pytest.mark.parametrize("named", [{}, {"folder": "/elsewhere"}])
def test_a_manifests_reward_function_is_not_run_unasked(tmp_path, capsys, named):
    reward = tmp_path / "reward.py"
    reward.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(**_): return 1.0\n")
    folder = evaluation(tmp_path / "evaluation", named, reward)
    assert main(["report", str(folder), "--regrade"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"cppo report: --regrade: {folder} ")
    assert message.endswith(
        f"and grading runs the code that its manifest names ({reward}); give --trust if you trust who made it\n"
    )
    assert not Path(tmp_path / "ran").exists()


def test_it_is_run_where_the_evaluation_was_made_or_when_asked(tmp_path):
    from cppo_verl.evaluation.command import _check_reward

    own = evaluation(tmp_path / "own", {"folder": str(tmp_path / "own")}, "/x/reward.py")
    _check_reward(Evaluation.read(own), trusted=False)
    other = evaluation(tmp_path / "other", {"folder": "/elsewhere"}, "/x/reward.py")
    _check_reward(Evaluation.read(other), trusted=True)
    projects = evaluation(tmp_path / "projects", {"folder": "/elsewhere"}, OWN_REWARD)
    _check_reward(Evaluation.read(projects), trusted=False)
