"""Recipes, Table 1's cells and ablations compose without a GPU and hold the paper's numbers (figures/paper.json)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from omegaconf import OmegaConf

from cppo_verl.cli import main
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate

ROOT = Path(__file__).parents[2]
PAPER = json.loads((ROOT / "cppo_verl" / "figures" / "paper.json").read_text())
SCRIPTS = sorted(path.stem for path in (ROOT / "recipes").glob("qwen3_*.sh"))


@pytest.fixture
def compose(tmp_path, monkeypatch):
    """What a recipe's command line gives, checked, in a folder with prepared data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "data").mkdir()
    row = {
        "data_source": "aime24",
        "prompt": [{"role": "user", "content": "1?"}],
        "reward_model": {"style": "rule", "ground_truth": "1"},
    }
    for name in ("dapo", "aime24", "aime25", "aime26"):
        parquet.write_table(pa.Table.from_pylist([row] * 300), tmp_path / "data" / f"{name}.parquet")

    def run(overrides):
        config = configuration.compose(overrides)
        absent = validate(config, planned=True)
        assert all("Megatron-core is not installed" in problem.text for problem in absent), absent
        return config

    return run


def overrides_of(command):
    """The overrides with which a recipe's last line calls ``cppo train``, and those after the script's name."""
    script, *rest = [word for word in shlex.split(command) if word != "bash"]
    last = (ROOT / script).read_text().strip().splitlines()[-1]
    words = shlex.split(last.replace('"$@"', ""))
    return [*words[words.index("train") + 1 :], *rest]


def without(config, keys):
    plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for key in keys:
        OmegaConf.update(plain, key, None, merge=False)
    return OmegaConf.to_container(plain)


def listed(script):
    done = subprocess.run(["bash", f"recipes/{script}.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", [*PAPER["models"], "qwen3_8b_base_megatron"])
def test_recipe_holds_the_papers_numbers(compose, script):
    config, name = compose(overrides_of(f"recipes/{script}.sh")), script.removesuffix("_megatron")
    table3, shared = PAPER["models"][name]["table3"], PAPER["shared"]
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.model.path == PAPER["models"][name]["model"]
    found = {
        "prompts": config.data.train_batch_size,
        "n": rollout.n,
        "minibatch_prompts": actor.ppo_mini_batch_size,
        "updates": config.data.train_batch_size // actor.ppo_mini_batch_size,
        "t_max": config.data.max_response_length,
        **{key: config.method[key] for key in ("delta", "delta_b", "delta_b_quantile", "w_min")},
        "t_stop": config.trainer.total_training_steps,
    }
    assert found == table3
    assert actor.optim.lr == shared["learning_rate"]
    assert config.data.max_prompt_length == shared["max_prompt_length"]
    assert (config.divergence.name, config.divergence.k) == (shared["divergence"], shared["k"])
    assert (rollout.temperature, rollout.top_p) == (shared["temperature"], 1.0)
    assert {key: rollout.val_kwargs[key] for key in shared["validation"]} == shared["validation"]
    assert actor.loss_scale_factor == table3["t_max"]
    assert actor.use_dynamic_bsz == rollout.log_prob_use_dynamic_bsz  # verl asserts it in the first step
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert actor.ppo_max_token_len_per_gpu >= longest  # a whole response fits a micro-batch


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_says_what_the_paper_reports(name):
    text = (ROOT / "recipes" / f"{name}.sh").read_text()
    assert "GPUs: " in text
    assert "Hours: not known" in text
    assert "Run here: no" in text or "docs/gpu.md" in text
    scores = dict(re.findall(r"\b(CPPO|DPPO|GRPO) (\d+\.\d+)", text))
    model = name.removesuffix("_megatron")
    if model in PAPER["models"]:
        reported = PAPER["models"][model]["avg16"]
        assert scores == {method.upper(): f"{reported[method][3]:.2f}" for method in ("cppo", "dppo", "grpo")}
        assert f"best of {PAPER['models'][model]['table3']['t_stop']} steps" in text
    else:
        assert "Not the paper's run" in text


def test_megatron_recipe_differs_in_the_engine_only(compose):
    fsdp, megatron = (compose(overrides_of(f"recipes/qwen3_8b_base{end}.sh")) for end in ("", "_megatron"))
    for key in (
        "method",
        "data",
        "algorithm",
        "thresholds",
        "trainer.total_training_steps",
        "actor_rollout_ref.rollout.n",
    ):
        assert OmegaConf.select(fsdp, key) == OmegaConf.select(megatron, key), key
    assert (fsdp.actor_rollout_ref.actor.strategy, megatron.actor_rollout_ref.actor.strategy) == ("fsdp2", "megatron")


def test_the_30b_run_has_the_authors_parallelism(compose):
    config = compose(overrides_of("recipes/qwen3_30b_a3b_base.sh"))
    split = config.actor_rollout_ref.actor.megatron
    assert (split.tensor_model_parallel_size, split.expert_model_parallel_size) == (4, 8)
    assert (split.pipeline_model_parallel_size, split.expert_tensor_parallel_size) == (1, 1)
    assert split.param_offload
    assert split.optimizer_offload
    assert config.actor_rollout_ref.rollout.tensor_model_parallel_size == 2
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 32768
    routed = "actor_rollout_ref.actor.megatron.router_replay.mode=R3"
    replay = [routed, "actor_rollout_ref.rollout.enable_rollout_routing_replay=true"]
    assert compose([*overrides_of("recipes/qwen3_30b_a3b_base.sh"), *replay])


def test_table_1_has_every_method_on_every_model(compose):
    cells = listed("table1")
    assert len(cells) == 28
    seen = set()
    for cell in cells:
        config = compose(overrides_of(cell))
        recipe = re.search(r"recipes/(\S+)\.sh", cell)[1]
        seen.add((recipe, config.method.name))
        table3 = PAPER["models"][recipe]["table3"]
        if config.method.name in ("cppo", "dppo"):
            assert config.method.delta == table3["delta"]
    assert seen == {(model, method) for model, entry in PAPER["models"].items() for method in entry["avg16"]}


ABLATIONS = {
    "no-position-weight": {"weights": "uniform"},
    "no-prefix-budget": {"delta_b": None},
    "shuffled-weights": {"weights": "shuffled"},
    "soft-gate": {"soft_gate": True},
    "w-min-0.6": {"w_min": 0.6},
    "w-min-0.8": {},
    "delta-b-0.02": {},
    "delta-b-0.03": {"delta_b": 0.03, "delta_b_quantile": None},
    "kl": {"delta": 0.1, "delta_b": 0.002, "delta_b_quantile": None},
    "binary": {},
    "cppo": {},
}


def test_each_ablation_changes_one_thing(compose):
    configs = {
        cell.rsplit("qwen3_8b_base-", 1)[1]: compose([*overrides_of(cell), "run.name=x"])
        for cell in listed("ablations")
    }
    control = configs.pop("trm-max-avg")
    assert (control.method.delta_max, control.method.delta_avg, control.divergence.name) == (0.1, 0.002, "topk_kl")
    assert configs.keys() == ABLATIONS.keys()
    plain = configs["cppo"].method
    for name, config in configs.items():
        changed = {key: value for key, value in config.method.items() if value != plain[key]}
        assert changed == ABLATIONS[name], name
    own = ("method", "divergence", "thresholds", "actor_rollout_ref.actor.policy_loss")
    own += ("actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs",)  # follows divergence.k
    rests = {name: without(config, own) for name, config in {**configs, "trm-max-avg": control}.items()}
    assert {name for name, rest in rests.items() if rest != rests["cppo"]} == set()
    assert configs["kl"].divergence.name == "topk_kl"
    assert configs["binary"].divergence.name == "binary_tv"


def test_a_dry_run_needs_neither_data_nor_gpu(tmp_path, monkeypatch, capsys):
    """A run is planned on another machine than it is for; starting it there is refused."""
    monkeypatch.chdir(tmp_path)
    overrides = overrides_of("recipes/qwen3_30b_a3b_base.sh")
    assert main(["train", *overrides, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert OmegaConf.create(printed.out).data.train_batch_size == 256
    assert "# warnings: none" in printed.out
    assert "not on this machine: data.train_files: " in printed.err
    assert main(["train", *overrides]) == 2
    assert "data/dapo.parquet does not exist; cppo prepare makes data files" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_for_gpus_is_one_on_every_machine():
    """cppo doctor recipe=qwen3_8b_base without the recipe's script: what is examined is not a run on this CPU."""
    assert configuration.compose(["recipe=qwen3_8b_base"]).trainer.device == "cuda"
    assert configuration.compose(["recipe=qwen3_8b_base", "platform=cpu"]).trainer.device == "cpu"
    assert configuration.compose(["recipe=quickstart"]).trainer.device == ("cuda" if configuration.has_gpu() else "cpu")


def quickstart(folder, *words, script="quickstart"):
    """The script in a folder with nothing in it, on the environment of this test."""
    environment = {**os.environ, "VENV": sys.prefix, "ASSETS": str(folder / "assets")}
    command = ["bash", ROOT / f"recipes/{script}.sh", f"run.dir={folder}", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)


@pytest.mark.skipif(not (Path(sys.prefix) / ".cppo-setup").exists(), reason="not an environment of scripts/setup.sh")
def test_the_quickstart_warms_nothing_up_before_its_settings_are_right(tmp_path):
    assert "bash recipes/quickstart.sh [overrides]" in quickstart(tmp_path, "--help").stdout
    done = quickstart(tmp_path, "method=grpo", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "# checked: grpo over topk_tv" in done.stderr
    assert "bash recipes/tools.sh [overrides]" in quickstart(tmp_path, "--help", script="tools").stdout
    assert "bash recipes/smollm2.sh [overrides]" in quickstart(tmp_path, "--help", script="smollm2").stdout
    done = quickstart(tmp_path, "method=grpo", "--dry-run", script="smollm2")
    assert done.returncode == 0, done.stderr
    assert "# checked: grpo over topk_tv" in done.stderr
    done = quickstart(tmp_path, "method.detla=0.2", script="smollm2")
    assert done.returncode == 2
    assert "did you mean method.delta" in done.stderr
    done = quickstart(tmp_path, "--dry-run", script="tools")
    assert done.returncode == 0, done.stderr
    assert "default_agent_loop: single_turn_agent -> cppo_tool_agent" in done.stdout
    assert "# checked: cppo over topk_tv" in done.stderr
    done = quickstart(tmp_path, "method.detla=0.2")
    assert done.returncode == 2
    assert "did you mean method.delta" in done.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/manifest.json").write_text('{"settings": {"seed": 1}, "heldout_sampled": {}}')  # another build
    done = quickstart(tmp_path, "method.detla=0.2")
    assert done.returncode == 2
    assert "did you mean method.delta" in done.stderr
    assert "warming up" not in done.stdout
    assert list((tmp_path / "assets").iterdir()) == [tmp_path / "assets/manifest.json"]


def test_a_recipe_without_an_installation_says_what_to_do(tmp_path):
    command = ["bash", ROOT / "recipes/qwen3_8b_base.sh", "--dry-run"]
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "run scripts/setup.sh (for a --dry-run: scripts/setup.sh cpu)" in done.stderr


@pytest.mark.parametrize("recipe", ["side_by_side", "toy_table1"])
def test_without_a_folder_a_recipe_says_what_it_does_and_starts_nothing(recipe):
    for words, status in ((["-h"], 0), ([], 2), (["--seeds=1"], 2)):
        command = ["bash", ROOT / f"recipes/{recipe}.sh", *words]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        assert done.returncode == status
        assert f"bash recipes/{recipe}.sh FOLDER" in done.stdout


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("table1", ["--help"], "usage: recipes/table1.sh [list | run [MODEL [METHOD]]]"),
        ("table1", ["qwen3_8b_base"], "qwen3_8b_base is none of: list run"),
        ("table1", ["run", "qwen3_8b"], "qwen3_8b is none of: qwen3_1.7b"),
        ("table1", ["run", "qwen3_8b_base", "ppo"], "ppo is none of: grpo"),
        ("ablations", ["--help"], "usage: recipes/ablations.sh [list | run [NAME]]"),
        ("ablations", ["run", "soft"], "NAME: binary cppo"),
    ],
)
def test_a_wrong_word_starts_no_runs(script, words, message):
    done = subprocess.run(
        ["bash", ROOT / f"recipes/{script}.sh", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "VENV": "/nowhere", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
