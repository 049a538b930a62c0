"""The quickstart's task and model: disjoint problems, honest answers, a real Qwen3 that loads like any other."""

import json
import random
import re
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cppo_verl.config.check_files import inspect_data_file
from cppo_verl.grading import grade
from cppo_verl.quickstart.__main__ import SPECS, build_parser, main
from cppo_verl.quickstart.calculator import WORDS, called_with, calling_answer, evaluate, result_turn
from cppo_verl.quickstart.flags import settings_from
from cppo_verl.quickstart.model import build_tokenizer
from cppo_verl.quickstart.specs import ModelShape
from cppo_verl.quickstart.task import SignedSum, TaskSpec, make_splits, sloppy_answer, worked_answer
from cppo_verl.quickstart.warmup import encode_example


@pytest.fixture(scope="module")
def splits():
    return make_splits(TaskSpec(), seed=3)


def test_held_out_problems_occur_nowhere_else(splits):
    questions = [{problem.question for problem in part} for part in (splits.warmup, splits.train, splits.heldout)]
    assert [len(part) for part in questions] == [3000, 1600, 64]
    assert len(set.union(*questions)) == 3000 + 1600 + 64


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--terms", "48"], "10^47 problems: fewer terms, or smaller operands"),
        (["--terms", "2"], "do not fit the 50 distinct problems"),
        (["--warmup-worked-share", "1.5"], "--warmup-worked-share 1.5: give a number from 0 to 1"),
        (["--layers", "0"], "--layers 0: give a number above 0"),
        (["--vocabulary", "-1"], "--vocabulary -1: give a number above 0"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quickstart", "--out", str(tmp_path / "out"), *flags])
    monkeypatch.setattr("cppo_verl.quickstart.build.build_atomically", lambda *_: pytest.fail("it was built"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_finished_build_is_found_without_torch(tmp_path):
    script = "import sys; from cppo_verl.quickstart.__main__ import main; main(); print('torch' in sys.modules)"
    settings = settings_from(build_parser().parse_args(["--out", str(tmp_path), "--seed", "3"]), SPECS)
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": settings, "heldout_sampled": {}}))
    command = [sys.executable, "-c", script, "--out", str(tmp_path), "--seed"]
    done = subprocess.run([*command, "3"], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{tmp_path} already holds this build; nothing to do", "False"], done.stderr
    other = subprocess.run([*command, "4", "--is-built"], capture_output=True, text=True)
    assert (other.returncode, other.stdout) == (1, "")


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


THREE = SignedSum((37, 58, 99), (1, -1))


def test_every_call_of_a_calling_answer_gets_its_result():
    turns = calling_answer(THREE)
    assert [called_with(turn) for turn in turns[::2]] == ["37+58", "95-99", None]
    assert turns[1::2] == [result_turn("95"), result_turn("-4")]
    assert [str(evaluate(called_with(turn))) for turn in turns[:-1:2]] == ["95", "-4"]
    assert grade("".join(turns[::2]), str(THREE.answer)).outcome == "right"


@pytest.mark.parametrize("text", ["", "12+", "1*2", "1++2", "__import__('os')", "1" * 10, "\u0661+1", "1.5"])
def test_a_calculator_refuses_what_is_no_sum(text):
    with pytest.raises(ValueError, match="no sum of whole numbers"):
        evaluate(text)


def test_verls_tool_loop_reads_and_writes_the_tokens_of_the_warm_start():
    """Its parser finds the call, its template merges the result: token for token what the model was warmed up on."""
    import asyncio

    from verl.experimental.agent_loop.tool_parser import ToolParser
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    tokenizer = build_tokenizer(ModelShape(), WORDS)
    ids, learned = encode_example(tokenizer, THREE, calling_answer(THREE))
    assert tokenizer.unk_token_id not in ids
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3")
    parser = ToolParser.get_tool_parser("hermes", tokenizer)
    messages = [{"role": "user", "content": THREE.question}]
    stream = builder.build_initial_tokens(messages, tools=[{"type": "function", "function": {"name": "calculator"}}])
    assert stream == ids[: len(stream)]
    own = [False] * len(stream)
    turns = calling_answer(THREE)
    for number, turn in enumerate(turns[::2]):
        spoken = [*tokenizer.encode(turn, add_special_tokens=False), tokenizer.eos_token_id]
        stream = builder.merge_assistant_tokens(stream, spoken).token_ids
        own += [True] * len(spoken)
        _, calls = asyncio.run(parser.extract_tool_calls(spoken, []))
        assert [call.arguments for call in calls] == [f'{{"expression": "{called_with(turn)}"}}'] * (number < 2)
        if calls:
            before = [*messages, {"role": "assistant", "content": ""}]
            messages = [*before, {"role": "tool", "content": str(THREE.running_totals[number + 1])}]
            stream = builder.merge_context_tokens(before, messages, stream).token_ids
            own += [False] * (len(stream) - len(own))
    assert (stream, own) == (ids, learned)
    assert (len(ids) - learned.index(True), sum(learned)) == (53, 27)
