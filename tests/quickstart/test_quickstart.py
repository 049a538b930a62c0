"""The quickstart's task and model: disjoint problems, honest answers, a real Qwen3 that loads like any other."""

import random
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cppo_verl.config.check_files import inspect_data_file
from cppo_verl.grading import grade
from cppo_verl.quickstart.task import TaskSpec, make_splits, sloppy_answer, worked_answer


@pytest.fixture(scope="module")
def splits():
    return make_splits(TaskSpec(), seed=3)


def test_held_out_problems_occur_nowhere_else(splits):
    questions = [{problem.question for problem in part} for part in (splits.warmup, splits.train, splits.heldout)]
    assert [len(part) for part in questions] == [3000, 1600, 64]
    assert len(set.union(*questions)) == 3000 + 1600 + 64


def test_answers_are_the_value_of_the_expression(splits):
    for problem in splits.heldout:
        assert problem.answer == eval(problem.question.rstrip("?"))


def test_worked_answers_are_right_and_every_step_holds(splits):
    for problem in splits.heldout:
        text = worked_answer(problem)
        assert grade(text, str(problem.answer)).outcome == "right"
        steps = re.findall(r"(\S+)=(-?\d+) ", text)
        assert [eval(left) for left, _ in steps] == [int(right) for _, right in steps] == problem.running_totals[1:]


def test_sloppy_answers_are_boxed_and_mostly_wrong(splits):
    rng = random.Random(0)
    outcomes = [
        grade(sloppy_answer(problem, TaskSpec(), rng), str(problem.answer)).outcome for problem in splits.train[:400]
    ]
    assert set(outcomes) == {"right", "wrong"}
    assert outcomes.count("right") < 60


def test_model_and_tokenizer_load_like_any_other(live_assets, splits):
    tokenizer = AutoTokenizer.from_pretrained(live_assets / "model")
    model = AutoModelForCausalLM.from_pretrained(live_assets / "model")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.5e6
    for problem in splits.heldout:
        ids = tokenizer(worked_answer(problem), add_special_tokens=False)["input_ids"]
        assert 20 <= len(ids) <= 40
        assert tokenizer.decode(ids, skip_special_tokens=True) == worked_answer(problem)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": splits.heldout[0].question}], add_generation_prompt=True, tokenize=True
    )
    assert tokenizer.unk_token_id not in (prompt if isinstance(prompt, list) else prompt["input_ids"])


def test_data_files_are_verls(live_assets):
    assert inspect_data_file(live_assets / "train.parquet", "prompt") == (None, 64)
