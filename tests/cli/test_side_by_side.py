"""The comparison with stock verl and TRL: the arms agree where they can, the report says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from programs import importable

from cppo_verl.config.compose import compose, verl_config_dir

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "scripts" / "side_by_side"


@pytest.fixture(scope="module", autouse=True)
def programs():
    """The folder of the programs as an importable one."""
    with importable(PROGRAMS):
        yield


@pytest.fixture(scope="module")
def settings(programs, tmp_path_factory):
    """What each arm is told: our configurations by method, stock verl's composed from its own defaults, and TRL's."""
    import arms

    folder = tmp_path_factory.mktemp("side_by_side")
    ours = arms.our_settings(folder / "assets", folder, seed=7, steps=10, evaluate_every=5)
    cppo = compose([*ours, "run.name=cppo"])
    with initialize_config_dir(str(verl_config_dir()), version_base=None):
        stock = hydra_compose("ppo_trainer", overrides=arms.stock_overrides(cppo))
    return {
        "cppo": cppo,
        "grpo": compose([*ours, "method=grpo", "run.name=grpo"]),
        "stock": stock,
        "trl": arms.trl_settings(cppo, folder / "trl"),
    }


SHARED = {
    "data": "train_files val_files train_batch_size seed max_prompt_length max_response_length",
    "algorithm": "adv_estimator use_kl_in_reward norm_adv_by_std_in_grpo",
    "actor_rollout_ref.model": "path",
    "actor_rollout_ref.actor": "ppo_mini_batch_size ppo_epochs optim use_kl_loss entropy_coeff fsdp_config",
    "actor_rollout_ref.rollout": "n temperature top_p top_k dtype max_num_seqs val_kwargs",
    "reward": "custom_reward_function",
    "trainer": "total_training_steps test_freq val_before_train save_freq device",
}


@pytest.mark.parametrize("node", SHARED)
def test_both_verls_agree(settings, node):
    for name in SHARED[node].split():
        values = [OmegaConf.select(settings[arm], f"{node}.{name}") for arm in ("cppo", "grpo", "stock")]
        assert values[0] == values[1] == values[2], name


def test_stock_is_verl_with_its_own_loss_worker_and_agent_loop(settings):
    stock = settings["stock"]
    assert "cppo_verl" not in str(stock).replace("pkg://cppo_verl.grading", "").replace(stock.data.train_files, "")
    assert stock.actor_rollout_ref.actor.policy_loss.loss_mode == "vanilla"
    assert stock.actor_rollout_ref.actor.loss_agg_mode == "token-mean"
    assert stock.algorithm.rollout_correction.bypass_mode is False
    assert stock.trainer.use_v1 is True


def test_trl_is_told_the_same_task(settings):
    stock, told = settings["stock"], settings["trl"]["config"]
    rollout, actor = stock.actor_rollout_ref.rollout, stock.actor_rollout_ref.actor
    update = told["per_device_train_batch_size"] * told["gradient_accumulation_steps"]
    assert update == actor.ppo_mini_batch_size * rollout.n == 128
    assert told["per_device_train_batch_size"] * told["steps_per_generation"] == 32 * 16
    assert told["steps_per_generation"] == settings["trl"]["updates"] == told["logging_steps"] == 4
    assert told["num_generations"] == settings["trl"]["samples"] == rollout.n == 16
    assert told["max_steps"] == 4 * stock.trainer.total_training_steps == 40
    assert told["max_completion_length"] == stock.data.max_response_length == 40
    assert told["learning_rate"] == actor.optim.lr == 2e-4
    assert told["lr_scheduler_type"] == actor.optim.lr_scheduler_type == "constant"
    assert [told["adam_beta1"], told["adam_beta2"]] == list(actor.optim.betas)
    assert (told["weight_decay"], told["max_grad_norm"]) == (actor.optim.weight_decay, actor.optim.clip_grad)
    assert told["epsilon"] == actor.clip_ratio_low == actor.clip_ratio_high
    assert (told["temperature"], told["beta"], told["seed"]) == (rollout.temperature, 0.0, 7)


def test_verls_lines_become_steps_and_evaluations(tmp_path):
    """Evaluations at 110 (12 s) and at the end of the second step (11 s); the steps lasted 20 and 15 s."""
    from records import ours_measured, stock_measured

    accuracy, step = "val-core/arithmetic/acc/mean@16", {"response_length/mean": 25.0, "timing_s/gen": 6.0}
    step["critic/score/mean"] = 0.5
    lines = [
        {"step": 0, accuracy: 0.3},
        {"step": 1, **step},
        {"step": 2, **step, accuracy: 0.6, "timing_s/testing": 11.0},
    ]
    times = [122.0, 142.0, 168.0]
    expected = [
        {"event": "evaluation", "step": 0, "at": 22.0, "seconds": 12.0, "accuracy": 0.3},
        {"event": "step", "step": 1, "at": 42.0, "seconds": 20.0},
        {"event": "step", "step": 2, "at": 57.0, "seconds": 15.0},
        {"event": "evaluation", "step": 2, "at": 68.0, "seconds": 11.0, "accuracy": 0.6},
    ]
    for record in expected:
        if record["event"] == "step":
            record |= {"tokens": 12800, "rollout_seconds": 6.0, "reward": 0.5}

    folder = tmp_path / "run"
    folder.mkdir()
    pairs = zip(lines, times, strict=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**line, "time": at}) + "\n" for line, at in pairs))
    (folder / "events.jsonl").write_text(json.dumps({"event": "validating", "step": 0, "time": 110.0}) + "\n")
    assert ours_measured(folder, started=100.0, responses=512) == expected

    verls = tmp_path / "stock.jsonl"
    verls.write_text("".join(json.dumps({"step": line["step"], "data": line}) + "\n" for line in lines))
    assert stock_measured(verls, [110.0, *times], started=100.0, responses=512) == expected


def attempt(repeat, arm, start_up, step, after, ending="finished"):
    """Two steps of ``step`` seconds; an evaluation of 5 s before them and one after."""
    common = {"repeat": repeat, "seed": repeat, "arm": arm}
    begun, rollouts = start_up + 5, {"tokens": 1000, "rollout_seconds": step / 2, "reward": 0.4}
    records = [
        {"event": "started", "command": arm},
        {"event": "evaluation", "step": 0, "at": begun, "seconds": 5.0, "accuracy": 0.3},
        *({"event": "step", "step": n, "at": begun + n * step, "seconds": step, **rollouts} for n in (1, 2)),
        {"event": "evaluation", "step": 2, "at": begun + 2 * step + 5, "seconds": 5.0, "accuracy": after},
        {"event": ending, "seconds": 99.0, **({"status": 1, "log": ["boom"]} if ending == "failed" else {})},
    ]
    if ending == "failed":
        del records[2:-1]
    return "".join(json.dumps({**common, **record}) + "\n" for record in records)


def test_the_report_pairs_repeats_and_hides_no_failure(tmp_path):
    lines = attempt(0, "cppo", 60, 10, 0.8) + attempt(0, "trl", 6, 4, 0.9) + attempt(1, "trl", 6, 6, 0.75)
    lines += attempt(1, "cppo", 60, 12, 0.8) + attempt(0, "stock", 0, 1, 0, "failed") + attempt(0, "stock", 50, 20, 0.6)
    lines += attempt(1, "stock", 0, 1, 0, "failed")
    (tmp_path / "side_by_side.jsonl").write_text(lines)
    command = [sys.executable, PROGRAMS / "report.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (tmp_path / "side_by_side.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines() if row.startswith("|")]
    cells = {(number > 6, row[0]): row[1:] for number, row in enumerate(rows)}
    first = cells[False, "TRL's GRPOTrainer"]
    assert first[:3] == ["2", "6.0 (6.0 to 6.0)", "5.00 (4.00 to 6.00)"]
    assert first[3] == "208 (167 to 250)"
    assert first[-2:] == ["82.5% (75.0% to 90.0%)", "16 (14 to 18)"]
    assert cells[False, "stock verl, GRPO"][0] == "1"
    assert cells[False, "`cppo train`, GRPO"] == ["0"] + ["-"] * 8
    paired = cells[True, "TRL's GRPOTrainer"]
    assert paired[:2] == ["2", "0.450 (0.400 to 0.500)"]
    assert paired[-1] == "+2.5 (-5.0 to +10.0)"
    assert cells[True, "stock verl, GRPO"][:2] == ["1", "2.000"]
    assert done.stdout.count("boom") == 2
    assert "stock verl, GRPO, repeat 1, attempt 1" in done.stdout
    assert (tmp_path / "side_by_side.svg").read_text().startswith("<?xml")
