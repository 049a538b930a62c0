"""Which checkpoints a run keeps and resumes from, what it says of failures, and the card of a merged model."""

import errno
import json
import os
import subprocess
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from cppo_verl.checkpoint import retention
from cppo_verl.checkpoint.card import _without_folders
from cppo_verl.checkpoint.export import export
from cppo_verl.checkpoint.find import CheckpointError, find
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.run.log import RunLog, read_lines, validation_score
from cppo_verl.training import launcher
from cppo_verl.training.launcher import environment, prepare_folder


@pytest.fixture
def base(live_assets, tmp_path):
    return [
        "platform=cpu",
        "recipe=quickstart",
        f"quickstart.assets={live_assets}",
        f"run.dir={tmp_path}",
        "run.name=r",
    ]


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 2, 4 and 6 complete, 8 half-written."""
    folder = tmp_path / "r" / "checkpoints"
    for step in (2, 4, 6, 8):
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
    for step in (2, 4, 6):
        retention.complete(folder / f"global_step_{step}", step, {"a": step})
    return folder


def test_only_complete_checkpoints_count(checkpoints):
    assert retention.complete_steps(checkpoints) == [2, 4, 6]
    assert retention.metrics_of(checkpoints / "global_step_4") == {"a": 4}
    retention.remove(checkpoints / "global_step_6")
    assert retention.complete_steps(checkpoints) == [2, 4]


@pytest.mark.parametrize(
    ("keep", "scores", "left"),
    [
        (None, {}, [2, 4, 6]),
        (1, {}, [6]),
        (2, {}, [4, 6]),
        (1, {2: 0.5, 4: 0.4}, [2, 6]),
        (1, {2: 0.5, 4: 0.5}, [2, 6]),  # of equal ones the earlier
        (1, {2: 0.1, 6: 0.3}, [6]),
        (2, {8: 0.9}, [4, 6]),  # the half-written one is nobody's best
    ],
)
def test_the_newest_and_the_best_are_kept(checkpoints, keep, scores, left):
    removed = retention.prune(checkpoints, keep, scores)
    assert retention.complete_steps(checkpoints) == left
    assert sorted([*removed, *left]) == [2, 4, 6]
    assert (checkpoints / "global_step_8").is_dir()


def test_the_best_is_chosen_by_the_aime_mean_where_there_is_one():
    line = {f"val-core/{name}/acc/mean@16": score for name, score in (("aime24", 0.2), ("math500", 0.8))}
    assert validation_score(line) == pytest.approx(0.5)
    assert validation_score({**line, "val-core/aime_mean/acc/mean@16": 0.1}) == 0.1
    assert validation_score({"a": 1}) is None


def test_a_run_resumes_from_its_newest_complete_checkpoint(base, checkpoints, tmp_path):
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("")  # killed while verl wrote it
    OmegaConf.save(configuration.compose(base), tmp_path / "r/config.yaml", resolve=True)
    for word in ("true", "auto"):
        config = configuration.compose([*base, f"run.resume={word}"])
        validate(config)
        assert config.run.resume is True
        assert config.trainer.resume_mode == "resume_path"
        assert config.trainer.resume_from_path == str(checkpoints / "global_step_6")


def test_an_earlier_checkpoint_is_not_resumed_beside_later_ones(base, checkpoints, tmp_path, monkeypatch):
    """Saving would prune it away, and the next resume take the later one; from another run it is as good as any."""
    OmegaConf.save(configuration.compose(base), tmp_path / "r/config.yaml", resolve=True)
    monkeypatch.chdir(tmp_path)
    earlier = ["trainer.resume_mode=resume_path", "trainer.resume_from_path=r/checkpoints/global_step_4/"]
    with pytest.raises(configuration.ConfigError, match=r"this run has later checkpoints \(6\); move them away"):
        validate(configuration.compose([*base, "run.resume=true", *earlier]))
    branch = configuration.compose([*base, "run.name=branch", *earlier])
    validate(branch)
    assert branch.trainer.resume_from_path == str(checkpoints / "global_step_4")
    retention.remove(checkpoints / "global_step_6")
    validate(configuration.compose([*base, "run.resume=true", *earlier]))


def test_verls_own_search_for_a_checkpoint_is_ours(base, checkpoints, tmp_path):
    OmegaConf.save(configuration.compose(base), tmp_path / "r/config.yaml", resolve=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("8")  # which is half-written
    config = configuration.compose([*base, "run.resume=true", "trainer.resume_mode=auto"])
    assert config.trainer.resume_from_path == str(checkpoints / "global_step_6")


def test_resuming_without_a_complete_checkpoint_begins_again(base, tmp_path):
    (tmp_path / "r/checkpoints/global_step_1/actor").mkdir(parents=True)
    OmegaConf.save(configuration.compose(base), tmp_path / "r/config.yaml", resolve=True)
    config = configuration.compose([*base, "run.resume=true"])
    assert config.trainer.resume_mode == "disable"


def test_auto_starts_what_is_not_there(base):
    config = configuration.compose([*base, "run.resume=auto"])
    validate(config)
    assert config.run.resume is False


def test_wandb_without_a_login_is_refused_before_ray_starts(base, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = configuration.compose([*base, "trainer.logger=[console,wandb]"])
    with pytest.raises(configuration.ConfigError, match="there is no login: run wandb login, or set WANDB_API_KEY"):
        validate(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    validate(config)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    validate(config)


def test_every_attempt_has_the_same_tracking_run(base, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    config = configuration.compose(base)
    ids = []
    for _ in range(2):
        prepare_folder(config, tmp_path / "r", ["cppo", "train"])
        variables = environment(config)
        ids.append(variables["WANDB_RUN_ID"])
        assert variables["WANDB_RESUME"] == "allow"
        assert variables["TENSORBOARD_DIR"] == str(tmp_path / "r/tensorboard")
    assert ids[0] == ids[1]
    other = configuration.compose([*base, "run.name=other"])
    prepare_folder(other, tmp_path / "other", ["cppo", "train"])
    assert environment(other)["WANDB_RUN_ID"] != ids[0]


def test_a_start_names_what_an_earlier_run_has_left_behind(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "stale_processes", lambda held=None: [(tmp_path / "old", [11, 12], 3 << 30)])
    monkeypatch.setattr(launcher, "supervise", lambda *_: launcher.INTERRUPTED)
    assert launcher.launch(configuration.compose(base), ["cppo", "train"]) == 130
    told = capsys.readouterr().err
    assert f"2 processes of the earlier run {tmp_path / 'old'} are still there, with 3.0 GiB of memory" in told
    assert "to end them: kill 11 12" in told


def test_a_run_does_not_go_on_beside_its_earlier_attempt(base, tmp_path, monkeypatch, capsys):
    left = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(120)"],
        env={**os.environ, launcher.RUN_TAG: "earlier", "CPPO_RUN_FOLDER": str(tmp_path / "r")},
    )
    started = []
    monkeypatch.setattr(launcher, "supervise", lambda *_: started.append(1) or launcher.INTERRUPTED)
    monkeypatch.setattr(launcher.time, "sleep", lambda _: None)
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(launcher.time, "monotonic", lambda: next(clock))
    config = configuration.compose(base)
    try:
        assert launcher.launch(config, ["cppo", "train"]) == 2
        told = capsys.readouterr().err
        assert "waiting for 1 processes of an earlier attempt to end" in told
        assert f"to end them: kill {left.pid}; then give the same command again" in told
        assert not started
    finally:
        left.kill()
        left.wait()
    assert launcher.launch(config, ["cppo", "train"]) == 130
    assert started


def test_a_run_folder_that_cannot_be_written_is_told(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    config = configuration.compose([*base, f"run.dir={tmp_path}/file"])
    assert launcher.launch(config, ["cppo", "train"]) == 2
    assert "file/r cannot be written: " in capsys.readouterr().err

    def full(path, text):
        path.with_name(path.name + ".tmp").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    config = configuration.compose([*base, "run.resume=auto"])
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "write_atomically", full)
        assert launcher.launch(config, ["cppo", "train"]) == 2
    assert "No space left on device; make room, or change run.dir" in capsys.readouterr().err
    assert (tmp_path / "r/config.yaml.tmp").exists()
    validate(configuration.compose([*base, "run.resume=auto"]))  # and the same command may start it


def test_a_failure_is_told_even_where_its_event_cannot_be_written(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    with pytest.raises(ZeroDivisionError), log.outcome():
        1 / 0  # noqa: B018
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["error"]) == ("failed", "ZeroDivisionError")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log, "_append", full)
    with pytest.raises(ZeroDivisionError), log.outcome():
        1 / 0  # noqa: B018


@pytest.fixture
def trained(base, tmp_path):
    """A run folder whose step 4 was validated, evaluated and merged by verl itself."""
    config = configuration.compose([*base, "method=dppo"])
    run = tmp_path / "r"
    prepare_folder(config, run, ["cppo", "train", "method=dppo", f"quickstart.assets={base[2].partition('=')[2]}"])
    actor = run / "checkpoints/global_step_4/actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface/config.json").write_text("{}")
    weights = actor / "huggingface/model.safetensors"
    weights.write_text("w")
    weights.chmod(0o600)  # as safetensors makes it
    retention.complete(actor.parent, 4, {})
    RunLog(run).metrics(4, {"val-core/toy/acc/mean@16": 0.734})
    (run / "eval/step_4-seed0").mkdir(parents=True)
    report = {"n": 32, "benchmarks": {"toy": {"avg": 0.711, "decoding_error": 0.0123}}}
    (run / "eval/step_4-seed0/report.json").write_text(json.dumps(report))
    return run


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/runs/model/", "model/"),
        ("a=/home/alice/x.parquet", "a=x.parquet"),
        ("data.val_files=['/a b/c/d.parquet',/e/f.parquet]", "data.val_files=['d.parquet',f.parquet]"),
        ("run.dir=/home/my user/runs", "run.dir=runs"),
        ("reward.path=file:///home/alice/r.py", "reward.path=r.py"),
        ("+x={path:/home/alice/q}", "+x={path:q}"),
        ("~/runs ", "runs "),
        ("~alice/runs/x", "x"),
        ("../alice/x.parquet", "x.parquet"),
        ("../../alice/x.parquet", "x.parquet"),
        ("model=Qwen/Qwen3-8B", "model=Qwen/Qwen3-8B"),
        ("pkg://cppo_verl.grading", "pkg://cppo_verl.grading"),
        ("https://host/a/b", "https://host/a/b"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("data/train.parquet", "data/train.parquet"),
    ],
)
def test_a_model_card_names_no_folder_of_a_machine(text, shown):
    assert _without_folders(text) == shown


def test_the_model_card_is_filled_from_the_run(trained, tmp_path, capsys):
    folder = export(find(str(trained)), tmp_path / "out", print)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "transformers"
    assert {"rlvr", "dppo"} <= set(header["tags"])
    for part in (
        "# r, step 4",
        "| `method.delta` | `0.15` |",
        "| toy Avg@16 | 73.4% |",
        "| toy Avg@32, step_4-seed0 | 71.1% (decoding error 1.2 points) |",
        "| base model | `model` |",
        "| training data | `train.parquet` |",
        "`cppo train method=dppo quickstart.assets=assets",
        "verl 0.9.1",
    ):
        assert part in text
    assert str(tmp_path) not in text
    assert trained.parent.name not in text
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(CheckpointError, match="exists: give a new folder"):
        export(find(str(trained)), tmp_path / "out", print)
    with pytest.raises(CheckpointError, match="is a Hugging Face folder already"):
        export(find(str(trained)), None, print)


LEAVING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from cppo_verl.run import lifeline

class Freed:
    def __del__(self):
        print("freed")

kept, pool = Freed(), ThreadPoolExecutor(1)
pool.submit(time.sleep, 0)
atexit.register(print, "callback")
threading.Timer(0.3, print, ["thread"]).start()
print("work", end=" ")
if sys.argv[1:]:
    lifeline.leave()
"""


@pytest.mark.parametrize(
    ("words", "said"), [([], ["work thread", "callback", "freed"]), (["now"], ["work thread", "callback"])]
)
def test_a_driver_leaves_as_python_does_but_frees_nothing(words, said):
    done = subprocess.run([sys.executable, "-c", LEAVING, *words], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr
