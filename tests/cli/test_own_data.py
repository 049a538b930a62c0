"""docs/own_data.md, block by block: own problems through `cppo prepare`, and an own reward function."""

import json
import re
from pathlib import Path

import pytest

from cppo_verl.cli import main
from cppo_verl.evaluation.generation import reward_function
from cppo_verl.evaluation.samples import Question, Sample, grade_sample, read_questions
from cppo_verl.grading import OUTCOMES

PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text()
BLOCKS = dict(re.findall(r"`([\w.]+\.(?:jsonl|py))`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    assert sorted(BLOCKS) == ["held.jsonl", "mine.jsonl", "my_reward.py"]
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_problems_become_verls_files(folder, capsys):
    command = re.search(r"^cppo (prepare .*)$", PAGE, re.MULTILINE)[1].split()
    assert main(command) == 0
    assert "mine: sum-1 is in held held-0: left out" in capsys.readouterr().out
    counts = json.loads(Path("data/manifest.json").read_text())["sets"]["mine"]
    assert (counts["rows"], counts["duplicates"], counts["overlapping"], counts["kept"]) == (4, 1, 1, 2)
    questions = read_questions([Path("data/mine.parquet")])
    assert [(q.benchmark, q.id, q.gold) for q in questions] == [
        ("mine", "half", r"\frac{3}{2}"),
        ("mine", "sum-2", "8"),
    ]


def test_training_accepts_them_with_the_own_reward(folder, live_assets, capsys):
    main(["prepare", "--train", "mine=mine.jsonl", "--eval", "held=held.jsonl"])
    command = re.search(r"^cppo (train recipe=.*)$", PAGE, re.MULTILINE)[1].split()
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("holds 2 problems, fewer than one batch (data.train_batch_size=64)\n")
    many = [{"problem": f"What is 3 + {n}?", "answer": str(n + 3)} for n in range(10, 110)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    main(["prepare", "--train", "mine=mine.jsonl", "--eval", "held=held.jsonl"])
    assert main(command) == 0
    capsys.readouterr()
    settings = ["recipe=quickstart", f"quickstart.assets={live_assets}", "data.train_files=data/mine.parquet"]
    settings += ["data.val_files=data/held.parquet", "reward.custom_reward_function.path=my_reward.py"]
    sizes = ["data.train_batch_size=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2"]
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8"
    assert main(["train", *settings, *sizes, micro, "--dry-run"]) == 2
    assert "100 of 100 prompts have more tokens than data.max_prompt_length=24" in capsys.readouterr().err
    assert main(["train", *settings, *sizes, micro, "data.max_prompt_length=200", "--dry-run"]) == 0
    assert f"path: {folder / 'my_reward.py'}" in capsys.readouterr().out


def test_the_own_reward_scores_and_evaluates(folder):
    function = reward_function({"path": str(folder / "my_reward.py"), "name": "compute_score", "kwargs": {}})
    right = function("mine", r"so \boxed{8}", "8", {})
    assert right["score"] == right["acc"] == 1.0
    assert function("mine", r"\BOXED{8}", "8")["score"] == -0.1
    assert function("mine", "eight", "8")["grade_no_answer"] == 1.0
    assert {key for key in right if key.startswith("grade_")} == {
        f"grade_{name}" for name in OUTCOMES if name != "right"
    }
    question = Question("mine", "sum-2", [], "8")
    for text, outcome in ((r"so \boxed{8}", "right"), (r"\boxed{9}", "wrong"), ("eight", "no_answer")):
        sample = Sample("mine", "sum-2", 0, 1, text, 3, "stop", "", None)
        assert grade_sample(sample, question, function).outcome == outcome


def test_keywords_and_coroutines(folder):
    (folder / "later.py").write_text("async def score(weight, **_):\n    return {'score': weight, 'acc': 1}\n")
    function = reward_function({"path": str(folder / "later.py"), "name": "score", "kwargs": {"weight": 0.5}})
    assert function(data_source="x", solution_str="", ground_truth="") == {"score": 0.5, "acc": 1}
