"""Table 1 in small: its rows compose, its sampling says what it sampled from, its tables are those by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import importable

from cppo_verl.config.compose import compose
from cppo_verl.config.validate import validate
from cppo_verl.problems import ConfigError
from cppo_verl.run.log import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "scripts" / "toy_table"


@pytest.fixture(scope="module", autouse=True)
def programs():
    """The folder of the programs as an importable one."""
    with importable(PROGRAMS):
        yield


def all_rows():
    with importable(PROGRAMS):
        from rows import ROWS
    return [name for group in ROWS.values() for name in group]


@pytest.fixture(scope="module")
def cppo(programs, tmp_path_factory):
    from rows import Cell, Column

    return compose(Cell(Column("3e-4", 4), "cppo", 0).overrides(tmp_path_factory.mktemp("cppo"), 40))


@pytest.mark.slow
@pytest.mark.parametrize("row", all_rows())
def test_a_row_is_a_valid_run_and_unlike_cppo(row, cppo, tmp_path, live_assets):
    from rows import Cell, Column, assets

    assets(tmp_path, 0).symlink_to(live_assets)
    config = compose(Cell(Column("3e-4", 4), row, 0).overrides(tmp_path, 40))
    assert validate(config) == []
    assert (config.run.staleness, config.trainer.total_training_steps, config.run.name) == (4, 40, f"{row}-seed0")
    assert list(config.run.dump_steps) == [10, 20]
    assert (config.method == cppo.method and config.divergence == cppo.divergence) == (row == "cppo")


def test_without_a_trust_region_nothing_can_be_masked(tmp_path):
    from hydra.utils import instantiate
    from rows import Cell, Column

    from cppo_verl.methods import Tokens

    method = instantiate(compose(Cell(Column("3e-4", 4), "none", 0).overrides(tmp_path, 40)).method)
    ones = torch.ones(2, 3)
    farthest = Tokens(-0.001 * ones, -20 * ones, ones, ones.bool(), divergence=ones)
    assert (method(farthest).gate == 1).all()


def test_groups_of_rows_and_what_is_none(tmp_path):
    from rows import MODES, PLAIN, ROWS, Column, cells

    names = {Column("1e-4", staleness, on).name for staleness in (0, 4) for on in (PLAIN, *MODES)}
    assert len(names) == 6  # the asynchronous modes have no known staleness
    column = Column("1e-4", 0)
    found = cells(column, ["delta_b", "cppo", "delta-b-0.03"], [0, 1])
    assert [cell.row for cell in found] == [*ROWS["delta_b"], "cppo"] * 2
    assert len({cell.folder(tmp_path) for cell in found}) == len(found)
    with pytest.raises(KeyError, match="ppo2"):
        cells(column, ["ppo2"], [0])


def test_log_probabilities_are_those_of_a_forward_pass(live_assets):
    from sampling import sample
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(live_assets / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(live_assets / "model")
    prompts = [[7, 8, 9], [10, 11, 12, 13, 14, 15], [16]]
    found = sample(model, tokenizer, prompts, max_tokens=12, k=5, seed=3)
    for prompt, response in zip(prompts, found, strict=True):
        assert response.prompt.tolist() == prompt
        ends = (response.ids == tokenizer.eos_token_id).nonzero()
        assert len(response.ids) == 12 or ends.tolist() == [[len(response.ids) - 1]]
        with torch.no_grad():
            logits = model(torch.cat([response.prompt, response.ids])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        sampled = log_probs.gather(-1, response.ids[:, None])[:, 0]
        torch.testing.assert_close(response.rollout_log_prob, sampled, rtol=0, atol=1e-5)
        top = log_probs.gather(-1, response.topk_ids.long())
        torch.testing.assert_close(response.rollout_topk_log_prob, top, rtol=0, atol=1e-5)
        torch.testing.assert_close(top[:, 0], log_probs.max(-1).values, rtol=0, atol=1e-5)
    again, other = (sample(model, tokenizer, prompts, 12, 5, seed) for seed in (3, 4))
    assert [response.ids.tolist() for response in again] == [response.ids.tolist() for response in found]
    assert [response.ids.tolist() for response in other] != [response.ids.tolist() for response in found]


def record(row, seed, scores, masked=0.1):
    accuracy = dict(zip((0, 5, 10, 15, 20), scores, strict=True))
    shares = {"masked": masked, "masked_by_prefix": masked / 2}
    distance = {"divergence": "binary_tv" if row == "grpo" else "topk_tv", "mean_divergence": masked / 10}
    return {"column": "lr1-stale4", "row": row, "seed": seed, "accuracy": accuracy, **shares, **distance}


def test_the_table_by_hand():
    from tables import interval, tables

    found = [
        record("grpo", 0, (0.3, 0.5, 0.8, 0.6, 0.2)),
        record("grpo", 1, (0.3, 0.5, 0.6, 0.4, 0.4)),
        record("cppo", 0, (0.3, 0.5, 0.7, 0.8, 0.9), masked=0.25),
        record("cppo", 1, (0.3, 0.5, 0.7, 0.8, 0.7), masked=0.05),
    ]
    # t(0.975, 1) = 12.706; the standard error of two values is half their difference.
    assert interval([0.2, 0.4]) == pytest.approx((0.3, 12.706 * 0.1), rel=1e-4)
    text = "".join(tables(found))
    assert "| row | seeds | step 0 | step 5 | step 10 | step 15 | best |" in text
    grpo = "| grpo | 2 | 30.0 | 50.0 | 70.0 | 50.0 | 70.0 | 30.0 ± 127.1 | 0.46 | -50.0 ± 254.1 | 10.00% | 5.00% |"
    assert f"{grpo} 0.0100 (binary_tv) |" in text
    assert "| cppo | 2 | 30.0 | 50.0 | 70.0 | 80.0 | 85.0 | 80.0 ± 127.1 | 0.94 |  | 15.00% | 7.50% | 0.0150 |" in text


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_a_cell_on_the_stack_is_a_valid_run(mode, tmp_path, live_assets):
    from rows import Cell, Column, assets

    assets(tmp_path, 0).symlink_to(live_assets)
    cell = Cell(Column("3e-4", 4, mode), "cppo", 0)
    config = compose([*cell.overrides(tmp_path, 40), "run.resume=auto"])
    assert validate(config) == []
    assert config.trainer.v1.trainer_mode == mode
    assert config.run.staleness == (4 if mode == "sync" else 0)
    assert not cell.is_done(tmp_path, 40)


def test_a_cell_of_other_steps_is_neither_taken_nor_lost(tmp_path):
    from rows import Cell, Column

    plain, stack = (Cell(Column("3e-4", 4, on), "cppo", 0) for on in ("plain", "sync"))
    for cell in (plain, stack):
        (cell.folder(tmp_path) / "validation").mkdir(parents=True)
        for step in (0, 20):
            (cell.folder(tmp_path) / "validation" / f"{step}.jsonl").touch()
        assert cell.is_done(tmp_path, 20)
        with pytest.raises(ConfigError, match="is a training of 20 steps, not 10: give another folder"):
            cell.is_done(tmp_path, 10)
    assert not stack.is_done(tmp_path, 40)  # goes on from a checkpoint
    with pytest.raises(ConfigError, match="is a training of 20 steps, not 40: give another folder"):
        plain.is_done(tmp_path, 40)


@pytest.mark.slow
def test_cells_are_run_folders_and_are_trained_once(tmp_path):
    """Two rows of two steps; again, nothing is trained, and what is there is in the table."""
    variables = os.environ | {"CPPO_QUICKSTART_FLAGS": "--warmup-steps 60 --measure-samples 2"}

    def train(*rows):
        words = ["--rows", *rows, "--seeds", "0", "--steps", "2", "--staleness", "1", "--lr", "1e-4"]
        command = [sys.executable, PROGRAMS / "train_cells.py", tmp_path, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = train("grpo", "shuffled-weights")
    assert "2 cells to train" in first
    folders = sorted((tmp_path / "lr1e-4-stale1").iterdir())
    assert [folder.name for folder in folders] == ["grpo-seed0", "shuffled-weights-seed0"]
    for folder in folders:
        steps = read_metrics(folder)
        assert [step for step, line in steps.items() if "val-core/arithmetic/acc/mean@8" in line] == [0, 2]
        assert steps[1]["actor/grad_norm"] > 0
        assert [steps[step]["staleness/mean"] for step in (1, 2)] == [0, 1]
        assert len((folder / "validation" / "2.jsonl").read_text().splitlines()) == 64 * 8
        for command in ("table", "plot"):
            done = subprocess.run(
                [Path(sys.executable).parent / "cppo", command, folder], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    # Generated by the same weights, trained otherwise.
    lines = [read_metrics(folder) for folder in folders]
    assert lines[0][1]["critic/score/mean"] == lines[1][1]["critic/score/mean"]
    assert lines[0][2]["actor/grad_norm"] != lines[1][2]["actor/grad_norm"]
    again = train("grpo")
    assert "to train" not in again
    assert "shuffled-weights" in again
    kept = [json.loads(line) for line in (tmp_path / "toy_table.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"], list(line["accuracy"])) for line in kept] == [
        ("grpo", 0, ["0", "2"]),
        ("shuffled-weights", 0, ["0", "2"]),
    ]
