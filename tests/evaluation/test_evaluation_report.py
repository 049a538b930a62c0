"""Reports and comparisons from kept samples: every number against a direct count, and what is refused."""

import functools
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from cppo_verl.cli import main
from cppo_verl.data.sources import AIME
from cppo_verl.evaluation import comparison, statistics
from cppo_verl.evaluation import report as reporting
from cppo_verl.evaluation.samples import (
    MANIFEST,
    QUESTIONS,
    SAMPLES,
    Evaluation,
    EvaluationError,
    Question,
    Sample,
    content_hashes,
    grade_sample,
    read_questions,
    write_lines,
)
from cppo_verl.grading import compute_score
from cppo_verl.run.manifest import manifest

N = 4


def settings(**decoding):
    return {
        "model": {"source": "/models/m", "name": "m", "sha256": "a" * 64},
        "questions": {"aime24": "b" * 64},
        "decoding": {"n": N, "temperature": 0.7, "top_p": 0.95, "max_tokens": 32, "seed": 0, **decoding},
        "chat": {"arguments": {}, "template_sha256": "c" * 64},
        "reward": {"path": "pkg://cppo_verl.grading", "name": "compute_score", "kwargs": {}, "sha256": None},
    }


def write_evaluation(folder, correct, drop=0, decoding=None, gold="34"):
    """An evaluation with the given benchmark -> bool [questions, samples]; the last ``drop`` samples are missing."""
    folder.mkdir()
    questions = [
        Question(name, str(number), [{"role": "user", "content": f"{name} {number}"}], gold)
        for name, rows in correct.items()
        for number in range(len(rows))
    ]
    samples = []
    for question in questions:
        for number, right in enumerate(correct[question.benchmark][int(question.id)]):
            text = rf"\boxed{{{34 if right else 35}}}"
            sample = Sample(question.benchmark, question.id, number, 7, text, 10 + number, "stop", "", None)
            samples.append(grade_sample(sample, question))
    write_lines(folder / QUESTIONS, map(asdict, questions))
    write_lines(folder / SAMPLES, map(asdict, samples[: len(samples) - drop]))
    named = {"questions": content_hashes(questions)}
    record = {"settings": settings(**(decoding or {})) | named, "attempts": [manifest(["cppo", "eval"])]}
    (folder / MANIFEST).write_text(json.dumps(record))
    return folder


@pytest.fixture
def correct():
    rng = np.random.default_rng(0)
    chances = {"aime24": 0.5, "aime25": 0.3, "aime26": 0.4, "math500": 0.9}
    sizes = {"aime24": 5, "aime25": 5, "aime26": 5, "math500": 12}
    return {name: rng.random((sizes[name], N)) < chance for name, chance in chances.items()}


def test_every_number_of_a_report(tmp_path, correct):
    report = reporting.summarize(Evaluation.read(write_evaluation(tmp_path / "e", correct)))
    for name, rows in correct.items():
        entry = report["benchmarks"][name]
        assert entry["questions"] == len(rows)
        assert entry["avg"] == rows.mean()
        assert entry["decoding_error"] == statistics.decoding_error(rows)
        assert entry["interval"] == list(statistics.question_interval(rows))
        assert entry["pass_at_k"] == {str(k): statistics.pass_at_k(rows, k) for k in range(1, N + 1)}
        # Two different answers only: a majority of right ones wins, a tie counts half.
        votes = rows.sum(axis=1)
        assert entry["maj_at_k"] == np.mean(np.where(votes * 2 == N, 0.5, votes * 2 > N))
        assert entry["outcomes"]["right"] == rows.sum()
        assert entry["outcomes"]["wrong"] == (~rows).sum()
        assert entry["truncated"] == 0.0
        lengths = np.broadcast_to(10 + np.arange(N), rows.shape)
        right, other = lengths[rows], lengths[~rows]
        assert entry["tokens"] == {
            "mean": 11.5,
            "median": 11.5,
            "max": 13,
            "mean_right": right.mean() if len(right) else None,
            "mean_not_right": other.mean() if len(other) else None,
        }
    mean = report["mean"]
    assert mean["label"] == "AIME24/25/26"  # MATH-500 is not part of it
    assert mean["avg"] == pytest.approx(np.mean([correct[name].mean() for name in AIME]))
    three = [correct[name] for name in AIME]
    assert mean["questions"] == 15
    assert mean["interval"] == list(statistics.mean_question_interval(three))
    assert mean["decoding_error"] == statistics.mean_decoding_error(three)
    assert mean["pass_at_k"]["2"] == pytest.approx(np.mean([statistics.pass_at_k(rows, 2) for rows in three]))
    assert mean["maj_at_k"] == pytest.approx(np.mean([report["benchmarks"][name]["maj_at_k"] for name in AIME]))
    error = next(line for line in reporting.markdown(report).splitlines() if line.startswith("| math500 |"))
    assert f"± {100 * report['benchmarks']['math500']['decoding_error']:.1f}" in error


def test_rates_of_samples_that_are_not_answers(tmp_path):
    folder = write_evaluation(tmp_path / "e", {"own": np.ones((2, N), dtype=bool)})
    lines = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    lines[0] |= {"outcome": "no_answer", "answer": None, "finish_reason": "length"}
    lines[1] |= {"outcome": "timeout"}
    lines[2] |= {"outcome": "error"}
    write_lines(folder / SAMPLES, lines)
    report = reporting.summarize(Evaluation.read(folder))
    entry = report["benchmarks"]["own"]
    assert entry["outcomes"] == {"right": 5, "wrong": 0, "no_answer": 1, "timeout": 1, "error": 1}
    assert entry["truncated"] == 1 / 8
    assert entry["avg"] == 5 / 8
    assert report["mean"] is None
    assert "2 samples could not be graded" in reporting.notes(report)[1]
    text = reporting.markdown(report)
    for shown in ("| own | 0.00% | 12.50% | 12.50% | 12.50% | 12.50% |", "62.5%", "| pass@3 |", "temperature 0.7"):
        assert shown in text


def test_report_command_writes_what_it_prints(tmp_path, correct, capsys):
    folder = write_evaluation(tmp_path / "e", correct)
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((folder / "report.json").read_text())
    assert f"{numbers['mean']['avg']:.1%}" in printed
    assert f"{numbers['mean']['avg']:.1%}" in (folder / "report.md").read_text()
    first = (folder / "report.json").read_bytes()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.json").read_bytes() == first


def test_regrading_mends_wrong_verdicts(tmp_path, correct, capsys):
    folder = write_evaluation(tmp_path / "e", correct)
    lines = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    write_lines(folder / SAMPLES, [line | {"outcome": "error"} for line in lines[:3]] + lines[3:])
    assert main(["report", str(folder), "--regrade"]) == 0
    assert "3 outcomes changed" in capsys.readouterr().out
    assert [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()] == lines


def test_incomplete_and_foreign_folders_are_refused(tmp_path, correct, capsys):
    folder = write_evaluation(tmp_path / "e", correct, drop=3)
    assert main(["report", str(folder)]) == 2
    assert "is incomplete: 105 of 108 samples are there" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is not an evaluation" in capsys.readouterr().err


def test_a_last_line_cut_off_by_a_kill_is_a_missing_sample(tmp_path, correct):
    folder = write_evaluation(tmp_path / "e", correct)
    path = folder / SAMPLES
    path.write_bytes(path.read_bytes()[:-20])
    assert [(question.id, number) for question, number in Evaluation.read(folder).missing()] == [("11", N - 1)]


def test_comparison_pairs_questions_whatever_their_order(tmp_path, correct, capsys):
    rng = np.random.default_rng(1)
    better = {name: rows | (rng.random(rows.shape) < 0.3) for name, rows in correct.items()}
    a = Evaluation.read(write_evaluation(tmp_path / "a", better))
    b = Evaluation.read(write_evaluation(tmp_path / "b", correct))
    expected = {name: statistics.paired_difference(better[name], correct[name]) for name in correct}
    b.questions.reverse()
    rows = comparison.compare(a, b)["rows"]
    for name, (difference, low, high, p_value) in expected.items():
        assert (rows[name]["difference"], rows[name]["low"]) == pytest.approx((difference, low))
        assert (rows[name]["high"], rows[name]["p_value"]) == pytest.approx((high, p_value))
        assert (rows[name]["a"], rows[name]["b"]) == (better[name].mean(), correct[name].mean())
    mean = statistics.mean_paired_difference([better[n] for n in AIME], [correct[n] for n in AIME])
    assert tuple(rows["AIME24/25/26"][key] for key in ("difference", "low", "high", "p_value")) == pytest.approx(mean)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c.json")]) == 0
    printed = capsys.readouterr().out
    assert f"{100 * rows['math500']['difference']:+.1f}" in printed
    assert "differs" not in printed
    assert json.loads((tmp_path / "c.json").read_text())["rows"]["math500"]["questions"] == 12


def test_comparison_names_other_settings_and_refuses_other_questions(tmp_path, correct, capsys):
    write_evaluation(tmp_path / "a", correct)
    write_evaluation(tmp_path / "b", correct, decoding={"temperature": 1.0})
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "temperature differs (A 0.7, B 1.0)" in capsys.readouterr().out
    write_evaluation(tmp_path / "c", {"aime24": correct["aime24"]}, gold="850")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "aime24 has other questions" in capsys.readouterr().err
    write_evaluation(tmp_path / "d", {"own": correct["aime24"]})
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "d")]) == 2
    assert "share no benchmark" in capsys.readouterr().err
    write_evaluation(tmp_path / "e", {"own": correct["aime24"][:1]})
    assert main(["compare", str(tmp_path / "e"), str(tmp_path / "e")]) == 2
    assert "at least two questions" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "no" / "c.json")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["3", "3", "4", None], 1.0),
        (["4", "4", "3", None], 0.0),
        (["3", "4", "3", "4"], 0.5),
        (["3", "4", "5", None], 1 / 3),
        ([None] * 4, 0.0),
    ],
    ids=["majority right", "majority wrong", "tie", "three-way tie", "no vote"],
)
def test_majority_vote(answers, expected):
    assert statistics.maj_at_k([answers], [[answer == "3" for answer in answers]]) == pytest.approx(expected)


def test_votes_for_one_value_in_several_spellings_are_one():
    spellings = ["034", "34.0", r"34^\circ", r"\frac{68}{2}", "$34$"]
    assert {reporting.spelling(text) for text in spellings} == {"34"}
    assert reporting.spelling(r"2\sqrt{5}") != reporting.spelling(r"\sqrt{5}")
    assert reporting.spelling(None) is reporting.spelling("  ") is None


def test_mean_interval_covers_the_mean_of_benchmarks_with_their_nominal_chance():
    rng = np.random.default_rng(3)
    shapes = [(0.5, 1.2), (2.0, 2.0), (0.3, 3.0)]
    truth = np.mean([a / (a + b) for a, b in shapes])
    covered = 0
    for _ in range(1000):
        chances = [rng.beta(a, b, 30) for a, b in shapes]
        low, high = statistics.mean_question_interval([rng.random((30, 8)) < c[:, None] for c in chances])
        covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_mean_decoding_error_is_the_spread_of_repeated_decodings():
    rng = np.random.default_rng(4)
    chances = [rng.beta(0.5, 1.2, 20), rng.beta(2, 2, 40)]
    runs = [[rng.random((len(c), 4)) < c[:, None] for c in chances] for _ in range(4000)]
    spread = np.std([np.mean([rows.mean() for rows in run]) for run in runs])
    assert np.mean([statistics.mean_decoding_error(run) for run in runs]) == pytest.approx(spread, rel=0.05)


def test_mean_paired_difference_weighs_benchmarks_equally():
    rng = np.random.default_rng(5)
    a = [rng.random((10, 4)) < 0.7, rng.random((40, 4)) < 0.4]
    b = [rng.random((10, 4)) < 0.3, rng.random((40, 4)) < 0.4]
    difference, low, high, p_value = statistics.mean_paired_difference(a, b)
    assert difference == pytest.approx(np.mean([x.mean() - y.mean() for x, y in zip(a, b, strict=True)]))
    assert low < difference < high
    # By hand: flip the signs of all 50 differences, each weighted by one over its benchmark's size.
    weighted = np.concatenate([(x.mean(1) - y.mean(1)) / len(x) for x, y in zip(a, b, strict=True)])
    flipped = np.random.default_rng(0).choice([-1, 1], (100_000, 50)) @ weighted
    assert p_value == pytest.approx((np.abs(flipped) >= abs(weighted.sum()) - 1e-12).mean(), abs=0.02)


def test_paired_interval_covers_and_its_p_value_is_uniform_without_a_difference():
    rng = np.random.default_rng(6)
    covered, p_values = 0, []
    for _ in range(400):
        chance = rng.beta(0.5, 1.2, 30)
        a, b = (rng.random((30, 4)) < chance[:, None] for _ in range(2))
        _, low, high, p_value = statistics.paired_difference(a, b)
        covered += low <= 0 <= high
        p_values.append(p_value)
    assert 0.92 <= covered / 400 <= 0.98
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def _parquet(path, rows):
    import pandas as pd

    pd.DataFrame(rows).to_parquet(path)
    return path


def _row(text, gold, source="own", **extra):
    prompt = [{"role": "user", "content": text}]
    return {
        "data_source": source,
        "prompt": prompt,
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"index": 0, **extra},
    }


def test_questions_of_data_files(tmp_path):
    rows = [_row("a", "1"), _row("b", "2"), _row("a", "1"), _row("a", "1", source="other", answer_line=True)]
    questions = read_questions([_parquet(tmp_path / "d.parquet", rows)])
    found = [(q.benchmark, q.id, q.gold) for q in questions]
    assert found == [("own", "0", "1"), ("own", "1", "2"), ("other", "0", "1")]
    assert questions[2].extra_info["answer_line"]
    assert [q.id for q in read_questions([tmp_path / "d.parquet"], limit=1)] == ["0", "0"]
    (tmp_path / "d.jsonl").write_text("{}\n")
    with pytest.raises(EvaluationError, match="is not a parquet file"):
        read_questions([tmp_path / "d.jsonl"])
    with pytest.raises(EvaluationError, match=r"missing\.parquet does not exist"):
        read_questions([tmp_path / "missing.parquet"])
    twice = _parquet(tmp_path / "t.parquet", [_row("a", "1", id="x"), _row("b", "1", id="x")])
    with pytest.raises(EvaluationError, match="two problems with the id x"):
        read_questions([twice])


def test_a_reward_function_of_ones_own_decides_the_outcome():
    question = Question("own", "0", [], "34")
    sample = Sample("own", "0", 0, 1, "the answer is 34", 5, "stop", "", None)
    assert grade_sample(sample, question).outcome == "no_answer"
    graded = [
        grade_sample(sample, question, lambda value=value, **_: value).outcome
        for value in (1, 0.0, {"score": 1.0}, {"score": 1.0, "acc": 0}, {"acc": 0, "grade_timeout": 1.0})
    ]
    assert graded == ["right", "wrong", "right", "wrong", "timeout"]
    assert grade_sample(sample, question, lambda **_: 1 / 0).outcome == "error"  # counted, and the sample kept


def test_options_of_the_row_reach_the_grader_as_in_training():
    line = Question("own", "0", [], "34", {"answer_line": True})
    sample = Sample("own", "0", 0, 1, "Answer: 34", 5, "stop", "", None)
    assert grade_sample(sample, line).outcome == "right"
    assert grade_sample(sample, line).answer == "34"
    plain = Question("own", "0", [], "34")
    assert grade_sample(sample, plain).outcome == "no_answer"
    assert grade_sample(sample, plain, functools.partial(compute_score, answer_line=True)).answer == "34"


@pytest.mark.parametrize("width", [80, 140])
def test_no_word_of_the_tables_is_cut(width):
    row = ("arithmetic", "19.92%", "0.29%", "0.00%", "0.00%", "0.00%", "30", "30", "36")
    console = Console(width=width, file=io.StringIO())
    console.print(reporting.rich_table(reporting._BEHAVIOUR_HEADINGS, iter([row]), width))
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert len(lines) == (3 if width == 80 else 2)
    for word in (*row, *" ".join(reporting._BEHAVIOUR_HEADINGS).split()):
        assert word in console.file.getvalue().split()
