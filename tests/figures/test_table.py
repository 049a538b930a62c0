"""``cppo table``: numbers by hand, both errors, seeds, the published ones, and the three formats."""

import json
import math

import numpy as np
import pytest
from run_folders import make_run

from cppo_verl.cli import main
from cppo_verl.evaluation import statistics
from cppo_verl.figures.table import BEST, LAST, read_rows

EARLY = {"toy": {"p": [1, 0, 0, 0], "q": [0, 0, 0, 0]}}
BEST_OF_ALL = {"toy": {"p": [1, 1, 1, 0], "q": [1, 1, 0, 0]}}
LATE = {"toy": {"q": [1, 0, 0, 0], "p": [1, 1, 0, 0]}}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "one", validations={0: EARLY, 5: BEST_OF_ALL, 10: LATE})


def test_best_and_last_by_hand(run):
    (row,) = read_rows([run], BEST, None)
    score = row.scores["toy"]
    assert (row.checkpoints[0].step, score.avg, score.k, score.spread) == (5, 0.625, 4, None)
    # Variances of the verdicts with ddof 1: 1/4 and 1/3; a quarter of each, two questions.
    assert score.decoding_error == pytest.approx(math.sqrt((1 / 4 + 1 / 3) / 4) / 2)
    assert score.interval == statistics.question_interval([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert row.checkpoints[0].biased
    (row,) = read_rows([run], LAST, None)
    assert (row.checkpoints[0].step, row.scores["toy"].avg, row.checkpoints[0].biased) == (10, 0.375, False)
    (row,) = read_rows([run], BEST, 4)
    assert (row.checkpoints[0].step, row.scores["toy"].avg) == (0, 0.125)


def test_seeds_are_one_row_with_their_spread(tmp_path):
    runs = [
        make_run(tmp_path / f"s{seed}", f"run.seed={seed}", validations={10: {"toy": {"p": p, "q": [1, 0, 0, 0]}}})
        for seed, p in ((1, [1, 1, 1, 1]), (2, [1, 1, 0, 0]))
    ]
    (row,) = read_rows(runs, LAST, None)
    score = row.scores["toy"]
    assert score.avg == pytest.approx((0.625 + 0.375) / 2)
    assert score.spread == pytest.approx(np.std([0.625, 0.375], ddof=1))
    errors = [math.sqrt(1 / 4 / 4) / 2, math.sqrt((1 / 4 + 1 / 3) / 4) / 2]
    assert score.decoding_error == pytest.approx(math.hypot(*errors) / 2)
    pooled = [[1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0]]
    assert score.interval == pytest.approx(statistics.question_interval(pooled))


def test_seeds_with_other_questions_have_no_interval_in_common(tmp_path):
    runs = [
        make_run(tmp_path / name, f"run.seed={seed}", validations={10: {"toy": {name: [1, 1, 0], "q": [1, 0, 0]}}})
        for seed, name in enumerate("ab")
    ]
    assert read_rows(runs, LAST, None)[0].scores["toy"].interval is None


def test_a_question_that_lacks_samples_is_left_out_and_told(tmp_path, capsys):
    make_run(tmp_path / "one", validations={10: {"toy": {"p": [1, 1], "q": [1, 0], "r": [0]}}})
    assert main(["table", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    assert "75.00" in printed
    assert "1 questions lack samples and are left out." in printed


AIME_VALIDATION = {f"aime{year}": {"p": [1, 1, 0, 0], "q": [1, 0, 0, 0]} for year in (24, 25, 26)}


def test_the_papers_numbers_stand_beside_and_the_last_column_is_the_mean(tmp_path, capsys):
    for method in ("cppo", "dppo"):
        make_run(tmp_path / method, f"method={method}", "actor_rollout_ref.model.path=Qwen/Qwen3-8B-Base",
                 validations={10: {**AIME_VALIDATION, "other": {"p": [1, 1, 1, 1], "q": [1, 1, 1, 1]}}})  # fmt: skip
    assert main(["table", str(tmp_path / "cppo"), str(tmp_path / "dppo")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "### Qwen3-8B-Base"
    headings = [cell.strip() for cell in printed[2].strip("|").split("|")]
    assert headings == [
        *("method", "aime24 Avg@4", "aime25 Avg@4", "aime26 Avg@4", "other Avg@4", "AIME24/25/26 Avg@4"),
        *("aime24 (paper)", "aime25 (paper)", "aime26 (paper)", "AIME24/25/26 (paper)", "checkpoint"),
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed[4:6]]
    assert [row[0] for row in cells] == ["cppo", "dppo"]
    assert cells[0][6:10] == ["34.58", "30.00", "28.75", "31.11"]
    assert cells[1][9] == "28.89"
    assert cells[0][5].startswith("37.50 ±")  # the mean of AIME, without the other set


def test_several_models_have_a_table_of_means(tmp_path, capsys):
    for name in ("Qwen3-1.7B", "Qwen3-30B-A3B-Base"):
        path = f"actor_rollout_ref.model.path=Qwen/{name}"
        make_run(tmp_path / name, "method=cispo", path, validations={10: AIME_VALIDATION})
    assert main(["table", *map(str, sorted(tmp_path.iterdir()))]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "### Mean over benchmarks"
    row = next(line for line in printed if line.startswith("| cispo |"))
    assert "paper 28.82" in row
    assert "paper diverged" in row


def test_an_evaluation_of_the_run_comes_before_its_validations(run, tmp_path):
    """``cppo eval RUN --all``: its best checkpoint was sampled afresh."""
    from cppo_verl.figures import table

    folder = run / "eval" / "step_5-seed1"
    folder.mkdir(parents=True)
    window = {"step": 5, "of": "toy", "folder": f"/moved/since/{folder.name}"}
    (run / "eval/all.json").write_text(json.dumps({"best_resampled": window, "last": window, "rows": []}))
    seen = []

    class Kept:
        benchmarks = ("toy",)
        questions = ()

        @classmethod
        def read(cls, path):
            seen.append(path)
            return cls()

        def correct(self, name):
            return np.zeros((0, 4), bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "Evaluation", Kept)
        found = table.judged(table.Run.read(run), BEST, None)
    assert seen == [folder]
    assert (found.step, found.source, found.biased) == (5, "cppo eval, best, fresh seeds", False)


def test_json_and_latex(run, tmp_path, capsys):
    assert main(["table", str(run), "--format", "json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["rows"]
    assert record["scores"]["toy"]["avg"] == 0.625
    assert record["runs"][0] == {"folder": str(run), "step": 5, "source": "validation, best of 3",
                                 "biased_upward": True, "questions_left_out": 0}  # fmt: skip
    out = tmp_path / "table.tex"
    assert main(["table", str(run), "--format", "latex", "--at", "last", "--out", str(out)]) == 0
    text = out.read_text()
    assert r"cppo & 37.50 $\pm$ 19.09" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1


def test_latex_escapes_what_a_name_may_hold(tmp_path, capsys):
    make_run(tmp_path / "one", validations={10: {"a_b%$\x1b[31m": {"p": [1, 0], "q": [1, 1]}}})
    assert main(["table", str(tmp_path / "one"), "--format", "latex"]) == 0
    printed = capsys.readouterr().out
    assert r"a\_b\%\$" in printed
    assert "\x1b" not in printed


def test_no_validation_within_reach_is_refused(tmp_path, capsys):
    folder = make_run(tmp_path / "one", validations={10: LATE})
    assert main(["table", str(folder), "--until", "5"]) == 2
    assert "has no validation up to step 5" in capsys.readouterr().err
