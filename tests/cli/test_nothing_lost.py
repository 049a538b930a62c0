"""What a command deletes or replaces is what it has made itself: nobody else's checkpoints, folders and links."""

import json
import os
import sys

import pytest
from omegaconf import OmegaConf

from cppo_verl.adapters.driver.trainer import TrustRegionTrainer
from cppo_verl.checkpoint import export, retention
from cppo_verl.checkpoint.find import CheckpointError, find
from cppo_verl.cli import main
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.quickstart import __main__ as quickstart
from cppo_verl.quickstart import build
from cppo_verl.run.log import RunLog
from cppo_verl.training import launcher
from cppo_verl.training.launcher import prepare_folder

pytestmark = pytest.mark.usefixtures("nothing_starts")


@pytest.fixture
def base(live_assets, tmp_path):
    return ["platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}/runs"]


def started(overrides, *steps):
    """A run as far as its folder, with complete checkpoints of ``steps``; its configuration."""
    config = configuration.compose(overrides)
    validate(config)
    prepare_folder(config, configuration.run_folder(config), ["cppo", "train"])
    for step in steps:
        folder = retention.step_folder(config.trainer.default_local_dir, step)
        (folder / "actor").mkdir(parents=True)
        retention.complete(folder, step, {})
    return config


def refused(overrides, capsys):
    """What ``cppo train`` prints of overrides that it refuses."""
    assert main(["train", *overrides]) == 2
    return capsys.readouterr().err.splitlines()


def test_another_runs_checkpoints_are_not_written_to(base, tmp_path, capsys):
    """Retention would prune them, and a step of the same number replace them."""
    started([*base, "run.name=a"], 2)
    theirs = f"trainer.default_local_dir={tmp_path}/runs/a/checkpoints"
    (line,) = refused([*base, "run.name=b", theirs], capsys)
    assert line.startswith(f"cppo train: {theirs}: it belongs to the run {tmp_path}/runs/a, whose files this run would")
    assert not (tmp_path / "runs/b").exists()
    started([*base, "run.name=b"])
    assert "it belongs to the run" in refused([*base, "run.name=b", "run.resume=true", theirs], capsys)[0]
    samples = f"trainer.validation_data_dir={tmp_path}/runs/a/validation"
    assert refused([*base, "run.name=c", samples], capsys)[0].startswith(f"cppo train: {samples}: it belongs to")


def test_a_link_does_not_hide_whose_checkpoints_they_are(base, tmp_path, capsys):
    started([*base, "run.name=a"], 2)
    (tmp_path / "link").symlink_to(tmp_path / "runs/a/checkpoints")
    (line,) = refused([*base, "run.name=b", f"trainer.default_local_dir={tmp_path}/link"], capsys)
    assert f"it belongs to the run {tmp_path}/runs/a" in line


def test_a_folder_outside_is_the_runs_that_came_first(base, tmp_path, capsys):
    outside = f"trainer.default_local_dir={tmp_path}/big/checkpoints"
    started([*base, "run.name=a", outside], 2, 4)
    (line,) = refused([*base, "run.name=b", outside], capsys)
    assert f"it belongs to the run {tmp_path}/runs/a ({tmp_path}/big/checkpoints/run.json says so)" in line
    resumed = configuration.compose([*base, "run.name=a", outside, "run.resume=true"])
    validate(resumed)
    assert resumed.trainer.resume_from_path.endswith("big/checkpoints/global_step_4")
    (tmp_path / "big/checkpoints/run.json").write_text("")
    assert "run.json:1: is empty; delete it if no run" in refused([*base, "run.name=b", outside], capsys)[0]


def test_checkpoints_that_name_no_run_are_somebodys(base, tmp_path, capsys):
    """Made before runs left their names, or by verl itself; the run that was writing there goes on."""
    outside = f"trainer.default_local_dir={tmp_path}/big"
    started([*base, "run.name=a", outside], 2)
    (tmp_path / "big/run.json").unlink()
    (line,) = refused([*base, "run.name=b", outside], capsys)
    assert "it holds global_step_2, which this run has not written and would replace" in line
    validate(configuration.compose([*base, "run.name=a", outside, "run.resume=true"]))
    started([*base, "run.name=c"])
    assert "it holds global_step_2" in refused([*base, "run.name=c", outside, "run.resume=true"], capsys)[0]


def test_of_two_runs_that_start_at_once_one_gets_the_folder(base, tmp_path, monkeypatch):
    outside = f"trainer.default_local_dir={tmp_path}/big"
    first, second = (configuration.compose([*base, f"run.name={name}", outside]) for name in "ab")
    for config in (first, second):
        validate(config)
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: launcher.INTERRUPTED)
    assert launcher.launch(first, ["cppo", "train"]) == launcher.INTERRUPTED
    with pytest.raises(configuration.ConfigError, match=rf"it belongs to the run {tmp_path}/runs/a"):
        launcher.launch(second, ["cppo", "train"])


def test_a_relative_folder_of_checkpoints_is_the_same_in_every_process(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configuration.compose([*base, "trainer.default_local_dir=big"])
    assert config.trainer.default_local_dir == str(tmp_path / "big")


@pytest.fixture
def linked(tmp_path):
    """Steps 2 and 4 of a run; 2 was moved to another disk, where its link leads."""
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step, folder in ((2, elsewhere), (4, checkpoints / "global_step_4")):
        folder.mkdir(parents=True)
        (folder / "weights").touch()
        retention.complete(folder, step, {})
    (checkpoints / "global_step_2").symlink_to(elsewhere)
    return checkpoints, elsewhere


def test_retention_leaves_links_and_what_they_lead_to(linked):
    checkpoints, elsewhere = linked
    assert retention.complete_steps(checkpoints) == [2, 4]
    assert retention.prune(checkpoints, 1, {}) == []
    retention.remove(checkpoints / "global_step_2")
    assert retention.complete_steps(checkpoints) == [2, 4]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["complete.json", "weights"]


def test_nothing_is_saved_through_a_link(linked, base, tmp_path, capsys):
    _, elsewhere = linked
    overrides = [*base, "run.name=a"]
    config = started(overrides, 1)
    own = f"{config.trainer.default_local_dir}/global_step_3"
    (elsewhere / "complete.json").unlink()  # else it would be resumed from
    (tmp_path / "runs/a/checkpoints/global_step_3").symlink_to(elsewhere)
    (line,) = refused([*overrides, "run.resume=true"], capsys)
    assert "global_step_3 is a symbolic link, and the run would save its step 3 there; move the link away" in line

    trainer = TrustRegionTrainer.__new__(TrustRegionTrainer)
    trainer.config, trainer.global_steps, trainer._keep = config, 3, None
    trainer.log = RunLog(tmp_path / "runs/a")
    with pytest.raises(FileExistsError, match=f"{own} is a symbolic link, which no run replaces"):
        trainer._save_checkpoint()
    assert [path.name for path in elsewhere.iterdir()] == ["weights"]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("w")
    return folder


def test_a_merge_leaves_what_lies_beside_its_target(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/thesis.tex").touch()
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full", "x")))
        assert main(["merge", str(model), "--out", str(tmp_path / "out")]) == 2
    assert sorted(tmp_path.iterdir()) == before
    assert main(["merge", str(model), "--out", str(tmp_path / "out")]) == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    assert (tmp_path / "out.tmp/thesis.tex").exists()
    assert (tmp_path / "out").stat().st_mode & 0o777 == model.stat().st_mode & 0o777
    assert main(["merge", str(model), "--out", str(tmp_path / "new/folder/out")]) == 0


@pytest.mark.parametrize("manifest", ['{"attempts": []}', '{"settings": {}, "attempts": []}', '{"sets": {}}', ""])
def test_the_quickstart_builds_over_its_own_builds_only(manifest, tmp_path, monkeypatch, capsys):
    """Runs, evaluations and data folders have a manifest.json too."""
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "checkpoint").touch()
    monkeypatch.setattr(build, "build_atomically", lambda *_: pytest.fail("it was replaced"))
    monkeypatch.setattr(sys, "argv", ["quickstart", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        quickstart.main()
    assert "exists and is not a quickstart build" in capsys.readouterr().err


def test_the_quickstart_keeps_what_lies_beside_its_build(tmp_path, monkeypatch, capsys):
    (tmp_path / "manifest.json").write_text('{"settings": {"seed": 1}, "heldout_sampled": {}}')
    for name in ("train.parquet", "heldout.parquet", "runs"):
        (tmp_path / name).touch()
    built = []
    monkeypatch.setattr(build, "build_atomically", lambda *_: built.append(1) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["quickstart", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        quickstart.main()
    assert "holds more than another build (runs); move it" in capsys.readouterr().err
    assert not built
    (tmp_path / "runs").unlink()
    with pytest.raises(SystemExit):
        quickstart.main()
    assert built


@pytest.mark.parametrize("name", ["merged", ".merging"])
def test_a_merge_replaces_earlier_merges_only(name, tmp_path, monkeypatch):
    """Shards may lie anywhere, beside a folder of that name."""
    shards = tmp_path / "actor"
    shards.mkdir()
    (shards / "fsdp_config.json").write_text('{"world_size": 1}')
    (shards / "model_world_size_1_rank_0.pt").touch()
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").touch()

    def merge(_, target, __):
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").touch()

    monkeypatch.setattr(export, "_merge", merge)
    with pytest.raises(CheckpointError, match=rf"{name} is in the way, and no merge of these shards has made it"):
        export.hugging_face_folder(find(str(shards)), print)
    assert (tmp_path / name / "thesis.tex").exists()
    (tmp_path / name).rename(tmp_path / "mine")
    merged = export.hugging_face_folder(find(str(shards)), print)
    os.utime(merged, (0, 0))  # older than the shards
    said = []
    export.hugging_face_folder(find(str(shards)), said.append)
    assert said
    assert "actor" in said[0]


def test_the_log_of_an_attempt_is_never_anothers(base, tmp_path):
    config = started([*base, "run.name=a"])
    logs = tmp_path / "runs/a/logs"
    for attempt in (1, 2, 3):
        (logs / f"train-{attempt}.log").touch()
    (logs / "train-2.log").unlink()
    assert prepare_folder(config, tmp_path / "runs/a", ["cppo", "train"]).name == "train-4.log"


def test_prepared_data_does_not_replace_other_files(tmp_path, capsys):
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    (tmp_path / "mine.tmp").write_text("notes")
    command = ["prepare", "--train", f"mine={source}", "--eval", "--out", str(tmp_path)]
    (tmp_path / "manifest.json").write_text('{"attempts": []}')
    assert main(command) == 2
    assert "manifest.json:1: lacks sets; give a folder of data sets, or a new one, as --out" in capsys.readouterr().err
    assert not (tmp_path / "mine.parquet").exists()
    (tmp_path / "manifest.json").unlink()
    assert main(command) == 0
    assert (tmp_path / "mine.tmp").read_text() == "notes"


def test_cost_curves_leave_the_manifest_of_a_run(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"attempts": []}')
    assert main(["bench", "--costs", str(tmp_path)]) == 2
    assert "manifest.json is of something else; give a folder of its own" in capsys.readouterr().err
    assert (tmp_path / "manifest.json").read_text() == '{"attempts": []}'


def test_notes_beside_the_validation_samples_stay(base, tmp_path):
    config = started([*base, "run.name=a", "run.resume=auto"], 2)
    folder = tmp_path / "runs/a/validation"
    folder.mkdir()
    for name in ("2", "4", "notes"):
        (folder / f"{name}.jsonl").touch()
    trainer = TrustRegionTrainer.__new__(TrustRegionTrainer)
    trainer.config, trainer.log, trainer.total_training_steps = config, RunLog(tmp_path / "runs/a"), 10
    OmegaConf.update(config, "trainer.resume_from_path", None)
    trainer._restore_history(2)
    assert sorted(path.stem for path in folder.iterdir()) == ["2", "notes"]
