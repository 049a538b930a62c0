"""``cppo train`` as a person uses it: to the end, on, evaluated, interrupted, failing, with verl's other settings."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
from leftovers import leftovers

from cppo_verl.data.sources import AIME
from cppo_verl.run.log import read_metrics

pytestmark = [pytest.mark.live, pytest.mark.slow]
CPPO = Path(sys.executable).parent / "cppo"


@pytest.fixture(scope="module")
def overrides(live_base):
    return [*live_base, "method.delta=0.004", "method.delta_b=0.0008", "trainer.total_training_steps=2"]


@pytest.fixture(scope="module")
def finished(overrides):
    done = subprocess.run(
        [
            CPPO,
            "train",
            *overrides,
            "trainer.val_before_train=true",
            "trainer.test_freq=2",
            "trainer.save_freq=2",
            "run.dump_steps=[2]",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_name_is_taken_and_resuming_goes_on(finished, overrides, live_folder):
    again = subprocess.run([CPPO, "train", *overrides], capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "is in use" in again.stderr
    resumed = subprocess.run(
        [CPPO, "train", *overrides, "run.resume=true", "trainer.total_training_steps=3"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert resumed.returncode == 0, resumed.stdout
    assert [line.split()[1] for line in finished.splitlines() if line.startswith("step ")] == ["0", "1/2", "2/2"]
    assert "3/3" in resumed.stdout
    steps = [line.split()[1] for line in resumed.stdout.splitlines() if line.startswith("step ")]
    assert "2/3" not in steps
    assert sorted(read_metrics(live_folder)) == [0, 1, 2, 3]
    assert (live_folder / "logs/train-2.log").exists()


def test_evaluation_of_the_checkpoint_agrees_with_the_runs_own_validation(finished, live_folder):
    """Shards merged, settings, data and reward function taken from the run; no option but a number of samples."""
    step = live_folder / "checkpoints" / "global_step_2"
    done = subprocess.run([CPPO, "eval", step, "-n", "64"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((live_folder / "eval" / "step_2-seed0" / "report.json").read_text())
    assert report["settings"]["decoding"]["temperature"] == 1.0  # the run's, not the default 0.7
    assert report["settings"]["reward"]["path"].endswith("rewards.py")
    mine = report["benchmarks"]["arithmetic"]
    validation = read_metrics(live_folder)[2]["val-core/arithmetic/acc/mean@16"]
    # The variances of both: the validation has 16 samples a question, four times the variance of 64.
    error = mine["decoding_error"] * (1 + 64 / 16) ** 0.5
    print(f"cppo eval {mine['avg']:.3f}, validation {validation:.3f}, standard error of the difference {error:.3f}")
    assert abs(mine["avg"] - validation) < 3.5 * error


def test_ctrl_c_leaves_no_process(overrides, tmp_path):
    run = tmp_path / "interrupted"
    process = subprocess.Popen(
        [CPPO, "train", *overrides, f"run.dir={tmp_path}", "run.name=interrupted", "trainer.total_training_steps=500"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores SIGINT, and so would this process if the tests run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= 2, 400)
        assert len(leftovers(run)) > 3
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 130
    assert "interrupted" in output
    assert leftovers(run) == []


def test_a_failure_shows_its_cause(overrides, tmp_path):
    reward = tmp_path / "broken.py"
    reward.write_text("def compute_score(*args, **kwargs):\n    raise RuntimeError('the reward is broken')\n")
    done = subprocess.run(
        [
            CPPO,
            "train",
            *overrides,
            f"run.dir={tmp_path}",
            "run.name=broken",
            f"reward.custom_reward_function.path={reward}",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode not in (0, 130)
    assert "the run failed" in done.stdout
    assert "the reward is broken" in done.stdout
    assert f"full log: {tmp_path}/broken/logs/train-1.log" in done.stdout
    assert leftovers(tmp_path / "broken") == []


def wait_for(condition, seconds):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited too long"
        time.sleep(0.5)


def test_verls_refilling_filter_trains(overrides, tmp_path):
    """Also: a run that never asks for Top-K rows. The stages of the other live runs begin with them."""
    settings = ["divergence=binary_tv", "algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc"]
    lines = trained(overrides, settings, tmp_path / "refill")
    assert all(line["groups/zero_variance"] == 0 for line in lines.values())


@pytest.fixture(scope="module")
def with_every_term(overrides, live_assets, tmp_path_factory):
    """KL loss, entropy bonus, rewards shaped by length, and validation on three sets named like AIME."""
    folder = tmp_path_factory.mktemp("terms")
    rows = pandas.read_parquet(live_assets / "heldout.parquet")
    files = []
    for number, name in enumerate(AIME):
        files.append(str(folder / f"{name}.parquet"))
        rows[number : number + 2].assign(data_source=name).to_parquet(files[-1])
    settings = [
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.entropy_coeff=0.01",
        "reward.reward_kwargs.overlong_buffer_cfg.enable=true",
        "reward.reward_kwargs.overlong_buffer_cfg.len=30",
        f"data.val_files=[{','.join(files)}]",
        "trainer.test_freq=2",
    ]
    return trained(overrides, settings, folder / "run"), folder / "run"


def test_validation_reports_the_mean_of_the_aime_sets(with_every_term):
    line = with_every_term[0][2]
    scores = [line[f"val-core/{name}/acc/mean@16"] for name in AIME]
    assert line["val-core/aime_mean/acc/mean@16"] == pytest.approx(sum(scores) / 3)
    assert len(set(scores)) > 1


def test_overlong_responses_cost_what_dapo_says_and_leave_acc_alone(with_every_term):
    """Longest 40, buffer 30: beyond 10 tokens a response loses (length - 10) / 30."""
    lines, folder = with_every_term
    samples = [json.loads(text) for text in (folder / "validation" / "2.jsonl").open()]
    assert len(samples) == 3 * 2 * 16
    assert sum(sample["overlong"] for sample in samples) > 10
    for sample in samples:
        assert sample["acc"] in (0.0, 1.0)
        assert sample["reward"] == pytest.approx(sample["acc"] + sample["overlong_reward"], abs=1e-6)
    costs = {round(-30 * sample["overlong_reward"]) for sample in samples}
    assert max(costs) == 30
    assert min(costs) == 0
    assert len(costs) > 5
    mine = [sample["acc"] for sample in samples if sample["data_source"] == "aime24"]
    assert lines[2]["val-core/aime24/acc/mean@16"] == pytest.approx(sum(mine) / len(mine))
    assert lines[2]["critic/score/min"] < 0


def test_an_own_model_and_own_problems_in_two_commands(tmp_path, live_assets):
    """A real vocabulary, whose embedding is larger than the smallest buffer; untrained weights, which learn nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = tmp_path / "model"
    config = AutoConfig.from_pretrained(
        live_assets / "model", vocab_size=49152, hidden_size=576, max_position_embeddings=2048
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(live_assets / "model").save_pretrained(model)
    rows = [json.dumps({"problem": f"{n}+3=", "answer": str(n + 3)}) for n in range(24)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows[:16]))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[16:]))
    page = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text()
    prepare, train = re.search(r"^cppo (prepare .*)\ncppo (train recipe=small .*)$", page, re.MULTILINE).groups()
    train = train.replace("path/to/model", str(model))
    short = ["trainer.total_training_steps=1", "data.max_response_length=32"]
    said = ""
    for command in (prepare.split(), [*train.split(), *short]):
        done = subprocess.run([CPPO, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    assert "nothing to learn from: no group has right and wrong responses." in said
    assert "gave no answer that can be found" in said
    assert re.search(r"^no signal +1 of 1 steps", said, re.MULTILINE)


def trained(overrides, settings, folder):
    """The metrics of a short run in ``folder``."""
    command = [CPPO, "train", *overrides, *settings, f"run.dir={folder.parent}", f"run.name={folder.name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(folder)
    assert sorted(lines) == [1, 2]
    return lines
