"""Files that decide something, damaged: every reader names file and line, and takes nothing for complete."""

import errno
import json
import os

import pytest

from cppo_verl.checkpoint import retention
from cppo_verl.checkpoint.find import checkpoints_of
from cppo_verl.cli import main
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.doctor.files import check_settings
from cppo_verl.doctor.findings import Subject
from cppo_verl.evaluation.command import _row
from cppo_verl.evaluation.request import open_evaluation
from cppo_verl.evaluation.samples import Question, content_hashes
from cppo_verl.problems import ConfigError
from cppo_verl.run import files
from cppo_verl.run.files import append_line, read_lines, write_atomically
from cppo_verl.run.log import RunLog, read_metrics
from cppo_verl.run.supervisor import _Tail
from cppo_verl.training import launcher
from cppo_verl.training.launcher import prepare_folder
from cppo_verl.training.summary import RunSummary

EMPTY, CUT, OTHER = "empty", "cut off in its middle", "something else"


def damage(path, how):
    """Returns the words that a reader has to say."""
    text = path.read_text()
    if how == EMPTY:
        path.write_text("")
    elif how == CUT:
        path.write_text(text[: int(0.4 * len(text))].rstrip() + "\n")
    else:
        path.write_bytes(b"\x00\xff\x80\n" * 3)
    return f"{path}:"


pytestmark = pytest.mark.usefixtures("nothing_starts")


@pytest.fixture
def base(live_assets, tmp_path):
    return [
        *("platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}"),
        *("run.name=r", "run.resume=true"),
    ]


@pytest.fixture
def run(base, tmp_path):
    """Steps 1 to 3 logged; 2 with shards of a checkpoint, whole but for the weights."""
    folder = tmp_path / "r"
    prepare_folder(configuration.compose([*base, "run.resume=false"]), folder, ["cppo", "train"])
    for step in (1, 2, 3):
        RunLog(folder).metrics(step, {"training/global_step": step, "critic/score/mean": 0.5})
    actor = folder / "checkpoints/global_step_2/actor"
    actor.mkdir(parents=True)
    (actor / "config.json").write_text("{}")
    (actor / "model.safetensors").write_text("w")
    retention.complete(actor.parent, 2, {"reward": 1.0})
    return folder


# A cut in the middle of metrics.jsonl leaves a broken line before the end, as a lost block does.
DECIDING = ("config.yaml", "manifest.json", "metrics.jsonl", "checkpoints/global_step_2/complete.json")
READERS = {
    "config.yaml": ("train", "eval", "merge", "doctor"),
    "manifest.json": ("train", "merge", "doctor"),
    "metrics.jsonl": ("train", "merge", "plot", "doctor"),
    "checkpoints/global_step_2/complete.json": ("train", "eval", "merge", "doctor"),
}


def command(name, run, base):
    return {
        "train": ["train", *base],
        "eval": ["eval", str(run)],
        "merge": ["merge", str(run), "--out", str(run / "out")],
        "plot": ["plot", str(run)],
    }[name]


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.parametrize("how", [EMPTY, CUT, OTHER])
def test_a_damaged_file_of_a_run_is_named_by_every_reader(run, base, name, how, capsys):
    named = damage(run / name, how)
    if (name, how) == ("metrics.jsonl", EMPTY):
        assert read_metrics(run) == {}  # of a run that has not logged a step
        return
    for reader in READERS[name]:
        if reader == "doctor":
            settings = configuration.compose(base)
            found = [finding.found for finding in check_settings(Subject(settings, described=True))]
            assert any(named in text for text in found), found
            continue
        assert main(command(reader, run, base)) == 2, reader
        told = capsys.readouterr().err
        assert told.startswith(f"cppo {reader}: "), told
        assert named in told
        assert told.count("\n") == 1
        assert int(told.split(named)[1].split(":")[0]) >= 1
    assert not (run / "out").exists()


def test_a_configuration_cut_off_between_two_settings_is_not_whole(run, base, capsys):
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines) if line.startswith("run:"))
    (run / "config.yaml").write_text("".join(lines[:end]))
    assert main(["train", *base]) == 2
    assert f"config.yaml:{end}: lacks run; put a copy back; logs/config-N.yaml" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_neither_resumed_from_nor_removed(run, base):
    newer = run / "checkpoints/global_step_4"
    newer.mkdir()
    (newer / "complete.json").write_text('{"step": 4, "metr')
    with pytest.raises(ConfigError, match=r"global_step_4/complete.json:1: is damaged .* move .*global_step_4 away"):
        validate(configuration.compose(base))
    assert retention.complete_steps(run / "checkpoints") == [2]
    assert retention.prune(run / "checkpoints", 1, {}) == []
    assert newer.is_dir()
    said = []
    assert [checkpoint.step for checkpoint in checkpoints_of(run, said.append)] == [2]
    assert "left out: " in said[0]
    assert "complete.json:1: is damaged" in said[0]
    newer.rename(run / "away")
    validate(configuration.compose(base))
    (newer.parent / "global_step_2/complete.json").write_text("")
    elsewhere = ["run.resume=false", "run.name=branch", "trainer.resume_mode=resume_path"]
    path = f"trainer.resume_from_path={run}/checkpoints/global_step_2"
    with pytest.raises(ConfigError, match=r"trainer.resume_from_path=.*complete.json:1: is empty"):
        validate(configuration.compose([*base, *elsewhere, path]))


def test_a_torn_last_line_is_left_out_and_said(run, base, capsys, monkeypatch):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "cri')
    said = f"{run}/metrics.jsonl:4: the last line was cut off and is left out"
    assert main(["plot", str(run)]) == 0
    assert f"cppo plot: {said}" in capsys.readouterr().err
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: launcher.INTERRUPTED)
    assert main(["train", *base]) == launcher.INTERRUPTED
    assert f"cppo: {said}" in capsys.readouterr().err
    RunLog(run).metrics(4, {})  # and what is written next is whole
    assert list(read_metrics(run)) == [1, 2, 3, 4]


def test_a_damaged_validation_is_named(run):
    (run / "validation").mkdir()
    for step in (0, 2):
        lines = [json.dumps({"input": name, "acc": 1.0, "data_source": "toy"}) for name in "pq"]
        (run / f"validation/{step}.jsonl").write_text("\n".join(lines) + "\n")
    assert len(RunSummary.read(run).changes) == 1
    (run / "validation/2.jsonl").write_text(lines[0] + "\n{}\n")
    with pytest.raises(ConfigError, match=r"validation/2.jsonl:2: is no sample of a validation"):
        RunSummary.read(run)
    (run / "validation/2.jsonl").write_text(lines[0][:20] + "\n" + lines[1] + "\n")
    with pytest.raises(ConfigError, match=r"validation/2.jsonl:1: is damaged"):
        RunSummary.read(run)


@pytest.fixture
def evaluation(tmp_path):
    """Two questions, one sample each."""
    folder = tmp_path / "e"
    settings = {
        "model": {"source": "m", "name": "m", "sha256": "0" * 64},
        "decoding": {"n": 1},
        "chat": {"arguments": {}, "template_sha256": "0" * 64},
        "reward": {"path": "pkg://cppo_verl.grading", "name": "compute_score", "kwargs": {}, "sha256": None},
    }
    folder.mkdir()
    question = {"benchmark": "toy", "prompt": [{"role": "user", "content": "1?"}], "gold": "1", "extra_info": {}}
    sample = {"benchmark": "toy", "sample": 0, "seed": 0, "response": r"\boxed{1}", "tokens": 3}
    sample |= {"finish_reason": "stop", "outcome": "right", "answer": "1"}
    questions = [{**question, "id": number} for number in "01"]
    settings["questions"] = content_hashes([Question(**line) for line in questions])
    files.write_lines(folder / "questions.jsonl", questions)
    files.write_lines(folder / "samples.jsonl", [{**sample, "question": number} for number in "01"])
    write_atomically(folder / "manifest.json", json.dumps({"settings": settings, "attempts": []}, indent=2) + "\n")
    assert main(["report", str(folder)]) == 0
    return folder


def test_questions_that_end_too_early_are_not_the_whole_benchmark(evaluation, capsys):
    lines = (evaluation / "questions.jsonl").read_text().splitlines(keepends=True)
    for kept in (lines[0], lines[0] + lines[1][:20]):
        (evaluation / "questions.jsonl").write_text(kept)
        assert main(["report", str(evaluation)]) == 2
        assert "questions.jsonl:1: is cut off: these are not all questions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest.json", "questions.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("how", [EMPTY, CUT, OTHER])
def test_a_damaged_file_of_an_evaluation_is_named_by_every_reader(evaluation, name, how, capsys):
    capsys.readouterr()
    settings = json.loads((evaluation / "manifest.json").read_text())["settings"]
    named = damage(evaluation / name, how)
    readers = (["report", str(evaluation)], ["report", str(evaluation), "--regrade"])
    readers += (["compare", str(evaluation), str(evaluation)],)
    for reader in readers:
        if (name, how) == ("samples.jsonl", EMPTY):  # an evaluation that has not begun
            continue
        assert main(reader) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"cppo {reader[0]}: ")
        assert named in told
        assert told.count("\n") == 1
    if (name, how) != ("samples.jsonl", EMPTY):
        with pytest.raises(ConfigError, match=named):
            open_evaluation(evaluation, settings, [])  # cppo eval


def test_a_sample_that_was_cut_off_is_missing_and_one_of_another_kind_is_named(evaluation, capsys):
    samples = (evaluation / "samples.jsonl").read_text()
    (evaluation / "samples.jsonl").write_text(samples[:-10])
    assert main(["report", str(evaluation)]) == 2
    assert "is incomplete: 1 of 2 samples are there" in capsys.readouterr().err
    (evaluation / "samples.jsonl").write_text(samples + '{"benchmark": "toy"}\n')
    assert main(["report", str(evaluation)]) == 2
    assert "samples.jsonl:3: is no sample of an evaluation; delete that line" in capsys.readouterr().err


def test_a_damaged_report_is_named_where_it_is_read_again(evaluation, run, capsys, monkeypatch):
    (evaluation / "report.json").write_text("")
    monkeypatch.setattr("cppo_verl.evaluation.command.folder_of", lambda *_: evaluation)
    with pytest.raises(ConfigError, match=rf"report.json:1: is empty; cppo report {evaluation} writes it again"):
        _row(None, None)
    (run / "eval/step_2-seed0").mkdir(parents=True)
    (run / "eval/step_2-seed0/report.json").write_text("{")
    assert main(["merge", str(run), "--out", str(run / "out")]) == 2
    assert "report.json:1: is damaged" in capsys.readouterr().err


def test_shards_whose_description_is_damaged_are_named(tmp_path, capsys):
    actor = tmp_path / "global_step_3/actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"FSDP_version": 2,')
    assert main(["merge", str(tmp_path / "global_step_3"), "--trust"]) == 2
    assert "fsdp_config.json:1: is damaged" in capsys.readouterr().err


def test_a_damaged_event_does_not_end_what_follows_it(tmp_path, capsys):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\n')
    tail = _Tail(path)
    with open(path, "a") as file:
        file.write('{"event": "b\n{"event": "c"}\n')
    assert [line["event"] for line in tail.new()] == ["c"]
    assert f"cppo: {path}:2: is damaged" in capsys.readouterr().err


def test_what_is_written_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """In this order: the new text, its name, the folder."""
    done = []
    names = {}

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append("folder" if name == str(tmp_path) else "text")
        names["text"] = name

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *_: done.append("name"))
    write_atomically(tmp_path / "x.json", "new")
    assert done == ["text", "name", "folder"]
    done.clear()
    append_line(tmp_path / "x.jsonl", {"a": 1})
    append_line(tmp_path / "x.jsonl", {"a": 2})
    assert done == ["text", "folder", "text"]


def test_a_checkpoints_files_are_on_disk_before_complete_json_says_so(tmp_path, monkeypatch):
    folder = tmp_path / "global_step_1"
    (folder / "actor").mkdir(parents=True)
    for name in ("actor/model.pt", "data.pt"):
        (folder / name).touch()
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(retention, "write_atomically", lambda path, _: done.append(str(path)))
    retention.complete(folder, 1, {})
    *before, last = done
    assert last == str(folder / "complete.json")
    assert {str(folder / "actor/model.pt"), str(folder / "data.pt"), str(folder / "actor"), str(folder)} <= set(before)


def test_a_full_disk_leaves_the_old_text_and_whole_lines(tmp_path, monkeypatch):
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text('{"old": 1}\n')

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (
            lambda: write_atomically(tmp_path / "x.json", "new"),
            lambda: append_line(tmp_path / "x.jsonl", {}),
        ):
            with pytest.raises(OSError, match="No space"):
                write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.jsonl"]
    append_line(tmp_path / "x.jsonl", {"new": 2})
    assert list(read_lines(tmp_path / "x.jsonl")) == [{"old": 1}, {"new": 2}]
    assert (tmp_path / "x.json").read_text() == '{"old": 1}\n'
