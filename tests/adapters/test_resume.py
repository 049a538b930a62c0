"""What the trainer restores when it resumes, how it fails to save, and which Ray it joins."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from cppo_verl.adapters.driver.main import ray_settings
from cppo_verl.adapters.driver.step_metrics import require_finite_rewards
from cppo_verl.adapters.driver.trainer import LoggedTracking, TrustRegionTrainer, _unsaved
from cppo_verl.checkpoint import retention
from cppo_verl.run.log import RunLog, read_lines


class Resuming:
    """As much of the trainer as restoring needs: a run of 10 steps, validated every 4, saved every 2."""

    def __init__(self, folder, step, mode="resume_path", source=None):
        checkpoints = folder / "checkpoints"
        self.trainer = SimpleNamespace(
            log=RunLog(folder),
            total_training_steps=10,
            _unfinished={},
            _unlogged=None,
            config=OmegaConf.create(
                {
                    "trainer": {
                        "default_local_dir": str(checkpoints),
                        "resume_mode": mode,
                        "resume_from_path": str((source or folder) / f"checkpoints/global_step_{step}"),
                        "test_freq": 4,
                        "val_before_train": True,
                    }
                }
            ),
        )
        TrustRegionTrainer._restore_history(self.trainer, step)
        self.lines = list(read_lines(folder / "metrics.jsonl"))
        self.validates = self.trainer.config.trainer.val_before_train


@pytest.fixture
def run(tmp_path):
    """Steps 0 to 5 logged, 0 and 4 validated; checkpoints of 2 and 4."""
    log = RunLog(tmp_path)
    for step in range(6):
        log.metrics(step, {"reward": step / 10} | ({"val-core/x/acc/mean@16": 0.5} if step % 4 == 0 else {}))
    (tmp_path / "validation").mkdir()
    for step in (0, 4, 8):
        (tmp_path / f"validation/{step}.jsonl").touch()
    for step in (2, 4):
        retention.step_folder(tmp_path / "checkpoints", step).mkdir(parents=True)
        folder = retention.step_folder(tmp_path / "checkpoints", step)
        retention.complete(folder, step, {"reward": step / 10, "saved": 1})
    return tmp_path


def without_validation(run, step):
    """As a kill while step ``step`` is validated leaves it: verl has not logged the step."""
    RunLog(run).forget_after(step - 1)


def test_later_steps_are_forgotten_and_nothing_is_validated_twice(run):
    resumed = Resuming(run, 4)
    assert [line["step"] for line in resumed.lines] == [0, 1, 2, 3, 4]
    assert not resumed.validates
    assert resumed.lines[-1]["val-core/x/acc/mean@16"] == 0.5
    assert "saved" not in resumed.lines[-1]  # as verl logged it
    assert sorted(path.stem for path in (run / "validation").iterdir()) == ["0", "4"]


def test_a_step_that_is_not_validated_keeps_its_line(run):
    without_validation(run, 2)
    resumed = Resuming(run, 2)
    assert [line["step"] for line in resumed.lines] == [0, 1]
    assert not resumed.validates
    # verl had not logged it, neither to the file nor to wandb: both get it from the checkpoint.
    logged = []
    trainer = SimpleNamespace(log=RunLog(run), _unfinished={}, _unlogged=resumed.trainer._unlogged)
    TrustRegionTrainer.logger.fset(trainer, SimpleNamespace(log=lambda data, step: logged.append((step, data))))
    assert logged == [(2, {"reward": 0.2, "saved": 1})]
    assert [(line["step"], line.get("saved")) for line in read_lines(run / "metrics.jsonl")][-1] == (2, 1)


def test_an_unfinished_validation_is_repeated_and_joins_the_steps_line(run):
    without_validation(run, 4)
    resumed = Resuming(run, 4)
    assert resumed.validates
    assert [line["step"] for line in resumed.lines] == [0, 1, 2, 3]
    sent = []
    wandb = SimpleNamespace(log=lambda data, step: sent.append((step, data)))
    tracking = LoggedTracking(wandb, RunLog(run), {**resumed.trainer._unfinished, "nan": None})
    tracking.log({"val-core/x/acc/mean@16": 0.75}, 4)
    assert sent == [(4, {"reward": 0.4, "saved": 1, "val-core/x/acc/mean@16": 0.75})]
    tracking.log({"reward": 0.5}, 5)
    *_, fourth, fifth = read_lines(run / "metrics.jsonl")
    assert (fourth["step"], fourth["reward"], fourth["val-core/x/acc/mean@16"]) == (4, 0.4, 0.75)
    assert (fifth["step"], fifth["reward"], "saved" in fifth) == (5, 0.5, False)


def test_without_a_checkpoint_everything_begins_again(run):
    resumed = Resuming(run, 0, mode="disable")
    assert resumed.lines == []
    assert resumed.validates


def test_a_run_that_starts_from_another_ones_checkpoint_has_its_own_history(run, tmp_path):
    RunLog(tmp_path / "other").folder.mkdir()
    RunLog(tmp_path / "other").metrics(4, {"reward": 1.0})  # of an attempt that was killed
    assert Resuming(tmp_path / "other", 4, source=run).lines == []


@pytest.mark.parametrize("verdict", [{"score": float("nan"), "acc": 0.0}, {"score": 1.0, "acc": float("inf")}])
def test_a_reward_that_is_no_number_is_refused(verdict):
    """Before the update; mask_std_0 may leave its group out of the loss, where it would go unseen."""
    fine = {"reward_extra_info": {"score": -0.5, "acc": 0.0}}
    require_finite_rewards([fine, {}])
    with pytest.raises(ValueError, match=r"the reward function returned (score = nan|acc = inf) for a response"):
        require_finite_rewards([fine, {"reward_extra_info": verdict}])


def test_a_checkpoint_that_cannot_be_written_is_removed_and_told(run):
    folder = run / "checkpoints/global_step_6"
    (folder / "actor").mkdir(parents=True)
    error = _unsaved(folder, RuntimeError("in a worker:\nOSError: [Errno 28] No space left on device\n"))
    assert not folder.exists()
    for part in (
        "global_step_6 could not be written and was removed (OSError: [Errno 28] No space left on device)",
        "the last complete one is",
        "checkpoints/global_step_4. The disk has",
        "give the same command with run.resume=true",
    ):
        assert part in str(error)
    assert "there is none yet" in str(_unsaved(run / "elsewhere/global_step_1", OSError("x")))


def test_an_own_ray_never_joins_somebody_elses():
    settings = OmegaConf.create({"num_cpus": 64, "num_gpus": 1, "include_dashboard": False, "address": None})
    assert ray_settings(settings, {"VERL_PLATFORM": "cpu"}) == {**settings, "address": "local"}


@pytest.mark.parametrize("given", ["setting", "environment"])
def test_a_running_cluster_gets_the_environment_and_keeps_its_size(given):
    """Ray refuses num_cpus and the like for a cluster that is there."""
    settings = OmegaConf.create({"num_cpus": 64, "num_gpus": 1, "include_dashboard": False, "address": None})
    environment = {"VERL_PLATFORM": "cpu", "HF_HOME": "/hf", "VLLM_HOST_IP": "10.0.0.1", "PATH": "/bin", "HOME": "/"}
    if given == "setting":
        settings.address = "10.0.0.1:6379"
    else:
        environment["RAY_ADDRESS"] = "10.0.0.1:6379"
    assert json.loads(json.dumps(OmegaConf.to_container(ray_settings(settings, environment)))) == {
        "runtime_env": {"env_vars": {"VERL_PLATFORM": "cpu", "HF_HOME": "/hf"}},
        "address": "10.0.0.1:6379",
    }
