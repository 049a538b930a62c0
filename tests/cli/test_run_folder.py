"""What a run writes and what is computed from it afterwards."""

import json
import re

import pytest
from run_folders import config_of

from cppo_verl.run.log import RunLog, read_lines, read_metrics
from cppo_verl.training.display import RunDisplay
from cppo_verl.training.summary import RunSummary, validation_changes


def test_lines_of_a_step_are_merged_and_later_ones_win(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(2, {"a": 1, "b": 2.5})
    log.metrics(1, {"a": 7})
    log.metrics(2, {"a": 3, "c": float("nan"), "d": "text"})
    metrics = read_metrics(tmp_path)
    assert list(metrics) == [1, 2]
    assert {name: metrics[2][name] for name in "abcd"} == {"a": 3, "b": 2.5, "c": None, "d": "text"}


def test_a_line_cut_off_by_a_crash_is_ignored(tmp_path):
    RunLog(tmp_path).metrics(1, {"a": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "a"')
    assert list(read_metrics(tmp_path)) == [1]


def test_resuming_forgets_what_will_be_trained_again(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics(step, {"a": step})
    log.forget_after(2)
    assert list(read_metrics(tmp_path)) == [1, 2]


@pytest.fixture
def run(tmp_path):
    """Two problems, four samples: 2 of 8 right before, 6 of 8 after; two steps of 100 tokens."""
    (tmp_path / "config.yaml").write_text(config_of(tmp_path))
    log = RunLog(tmp_path)
    for step, tokens, masked in ((1, 100, 10), (2, 300, 2)):
        log.metrics(
            step,
            {
                "training/global_step": step,
                "trust_region/tokens": tokens,
                "trust_region/masked_tokens": masked,
                "trust_region/masked_by_token": masked / 200,
                "critic/score/mean": 0.5,
            },
        )
    (tmp_path / "validation").mkdir()
    for step, verdicts in ((0, {"p": [1, 0, 0, 0], "q": [1, 1, 0, 0]}), (2, {"q": [1, 1, 0, 1], "p": [1, 1, 0, 0]})):
        with open(tmp_path / f"validation/{step}.jsonl", "w") as file:
            for problem, samples in verdicts.items():
                for acc in samples:
                    file.write(json.dumps({"input": problem, "acc": acc, "data_source": "toy"}) + "\n")
    return tmp_path


def test_change_of_validation_is_paired_by_problem(run):
    (change,) = validation_changes(run / "validation")
    assert (change.source, change.samples, change.problems, change.first_step, change.last_step) == ("toy", 4, 2, 0, 2)
    assert (change.before, change.after, change.difference) == pytest.approx((0.375, 0.625, 0.25))
    assert (change.low, change.high) == pytest.approx((0.25, 0.25))  # both problems gained as much: no spread


def test_masked_share_is_over_all_tokens_of_the_run(run):
    assert RunSummary.read(run).masked() == pytest.approx({"masked": 0.03, "token": 0.02, "prefix": 0.01})


def test_a_response_with_a_line_separator_of_unicode_is_one_sample(run):
    """verl writes them as they are, and a torn last line may follow."""
    with open(run / "validation/2.jsonl", "a") as file:
        sample = {"input": "p", "acc": 1, "data_source": "other", "output": "a\u2028b\x85c"}
        file.write(json.dumps(sample, ensure_ascii=False) + '\n{"input": "p", "a')
    *_, last = read_lines(run / "validation/2.jsonl")
    assert last["output"] == "a\u2028b\x85c"
    assert [change.source for change in validation_changes(run / "validation")] == ["toy"]


def test_answers_that_could_not_be_graded_are_in_the_summary(run):
    assert "failed grading" not in dict(RunSummary.read(run).rows())
    RunLog(run).metrics(1, {"grading/timeout": 3, "grading/error": 0})
    RunLog(run).metrics(2, {"grading/timeout": 1})
    assert dict(RunSummary.read(run).rows())["failed grading"].startswith("4 timeout (scored 0")


def test_summary_and_plots_are_written(run):
    RunSummary.read(run).write()
    assert json.loads((run / "summary.json").read_text())["validation"][0]["source"] == "toy"
    written = sorted(path.name for path in (run / "plots").iterdir())
    assert written == ["training.png", "trust_region.png"]  # what there are numbers for; tests/figures has the rest
    assert (run / "plots/training.png").stat().st_size > 10_000


def test_the_summary_leads_to_the_page_of_the_dumped_steps(run):
    assert "inspect" not in dict(RunSummary.read(run).rows())
    (run / "dumps/step_1").mkdir(parents=True)
    (run / "dumps/step_1/minibatch0_rank0_micro0.pt").touch()
    assert dict(RunSummary.read(run).rows())["inspect"] == f"cppo inspect {run} makes a page of the dumped steps"
    (run / "inspect.html").touch()
    assert dict(RunSummary.read(run).rows())["inspect"] == str(run / "inspect.html")


def test_display_prints_a_line_per_step_once(run, capsys):
    display = RunDisplay(run, run / "log")
    display.event({"event": "initialized", "step": 0, "total_steps": 2})
    line = {"step": 1, "trust_region/masked": 0.1, "trust_region/masked_by_token": 0.06}
    display.line(line)  # written before a checkpoint; not complete yet
    display.line(line | {"training/global_step": 1, "timing_s/step": 3.0, "critic/score/mean": 0.25})
    steps = [text for text in capsys.readouterr().out.splitlines() if text.startswith("step ")]
    display.line(line | {"training/global_step": 2, "critic/score/mean": None})  # NaN, as metrics.jsonl has it
    assert "reward nan" in capsys.readouterr().out
    assert "nothing to learn" not in capsys.readouterr().out
    silent = {"groups/total": 8, "groups/zero_variance": 8, "grading/right": 0, "grading/wrong": 64}
    for step in (1, 2):
        display.line(line | silent | {"step": step, "training/global_step": step})
    told = [text for text in capsys.readouterr().out.splitlines() if text.startswith("nothing to learn from: ")]
    assert len(told) == 1
    assert "no response is right" in told[0]
    assert len(steps) == 1
    assert all(
        word in steps[0] for word in ("1/2", "reward 0.250", "masked 10.00%", "token 6.00%", "3.0 s", "ETA 0m03s")
    )


def test_a_resumed_run_says_where_it_goes_on(run, capsys):
    display = RunDisplay(run, run / "log")
    display.event({"event": "initialized", "step": 1, "total_steps": 2})
    display.summary()
    output = capsys.readouterr().out
    assert "going on after step 1 of 2\n" in output
    assert re.search(r"^time .* min \(since step 1\)$", output, re.MULTILINE)


def test_the_outcome_is_written_while_the_run_ends(run, monkeypatch, capsys):
    display = RunDisplay(run, run / "log")
    display.event({"event": "finished"})
    display.outcome.result()
    assert list((run / "plots").glob("*.png"))
    assert (run / "summary.json").exists()
    monkeypatch.setattr(RunSummary, "write", lambda self: 1 / 0)
    display.summary()  # it is not written again
    assert "masked tokens" in capsys.readouterr().out
    display.event({"event": "finished"})
    with pytest.raises(ZeroDivisionError):  # and what went wrong in it is told
        display.summary()


def test_failure_shows_the_cause_not_the_wall(run, capsys):
    (run / "log").write_text("\n".join(f"line {number}" for number in range(500)))
    display = RunDisplay(run, run / "log")
    display.failure(1)
    assert capsys.readouterr().out.count("line ") == 15
    display.event({"event": "failed", "error": "ValueError", "message": "a\n" * 50 + "the cause"})
    display.failure(1)
    output = capsys.readouterr().out
    assert "ValueError" in output
    assert "the cause" in output
    assert len(output.splitlines()) < 12


def test_failure_shows_what_came_first(run, capsys):
    """verl ends a run with what a worker's error led to; the worker's own is in the log."""
    worker = "\x1b[36m(AgentLoopWorkerTQ pid=5399)\x1b[0m"
    (run / "log").write_text(
        f"{worker} Traceback (most recent call last):\n{worker}     raise RuntimeError('the reward is broken')\n"
        f"{worker} RuntimeError: the reward is broken\n"
        * 3
        + "ray.exceptions.RayTaskError(RuntimeError): a wall\nRuntimeError: no trajectories\n"
    )
    display = RunDisplay(run, run / "log")
    display.event({"event": "failed", "error": "RuntimeError", "message": "no trajectories"})
    display.failure(1)
    output = capsys.readouterr().out
    assert "RuntimeError: no trajectories" in output
    assert "earlier: RuntimeError: the reward is broken (3x)" in output
    assert "wall" not in output
    assert output.count("earlier") == 1


def test_what_the_end_itself_has_thrown_is_not_shown_as_earlier(run, capsys):
    (run / "log").write_text(
        "OSError: a disk\ncppo_verl.adapters.driver.deaths.ProcessDied: the queue is dead\n"
        "Exception ignored in: <coroutine>\nValueError: created in a different Context\n"
    )
    display = RunDisplay(run, run / "log")
    display.event({"event": "failed", "error": "ProcessDied", "message": "the queue is dead"})
    display.failure(1)
    output = capsys.readouterr().out
    assert "earlier: OSError: a disk (1x)" in output
    assert "different Context" not in output


def test_failure_names_the_actor_that_died(run, capsys):
    died = "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."
    (run / "log").write_text(
        f"(AgentLoopWorkerTQ pid=7) {died}\n(AgentLoopWorkerTQ pid=7) \tclass_name: TopKServer\n" * 2
    )
    display = RunDisplay(run, run / "log")
    display.event({"event": "failed", "error": "RuntimeError", "message": "no trajectories"})
    display.failure(1)
    assert f"earlier: {died} (class_name: TopKServer) (2x)" in capsys.readouterr().out
