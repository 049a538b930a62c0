"""What --dry-run prints: valid YAML, every difference from verl, quantities worked out by hand, true warnings."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from omegaconf import OmegaConf

from cppo_verl.cli import main
from cppo_verl.config.compose import compose, verl_config_dir
from cppo_verl.dry_run.cautions import cautions
from cppo_verl.dry_run.memory import GIB, estimate
from cppo_verl.dry_run.model import find_model

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
# Rows of the files that the recipes name.
ROWS = {"dapo": 5000, "aime24": 30, "aime25": 30, "aime26": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the recipes' data files are, no model is cached and there is no nvidia-smi; the working folder."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "data").mkdir()
    row = {
        "data_source": "aime24",
        "prompt": [{"role": "user", "content": "1?"}],
        "reward_model": {"style": "rule", "ground_truth": "1"},
    }
    for name, count in ROWS.items():
        parquet.write_table(pa.Table.from_pylist([row] * count), folder / "data" / f"{name}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        patch.setenv("PATH", str(folder))
        yield folder


@pytest.fixture(scope="module")
def printed(folder):
    """Runs ``cppo train --dry-run``, once for the same overrides; gives (stdout, sections as lists of lines)."""

    @cache
    def run(*overrides):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            assert main(["train", "--dry-run", "run.name=dry", *overrides]) == 0
        assert "# checked: " in err.getvalue()
        sections, title = {}, ""
        for line in out.getvalue().splitlines():
            if line.startswith("#   "):
                sections[title].append(line.removeprefix("#   "))
            elif line.startswith("# "):
                title = line.removeprefix("# ").partition(" ")[0].rstrip(":")
                sections[title] = []
        return out.getvalue(), sections

    return run


def recipe(name):
    return ["platform=gpu", f"recipe={name}"]


def pairs(lines):
    return dict(line.split(": ", 1) for line in lines)


def test_stdout_is_the_configuration_as_yaml(printed):
    text, _ = printed(*recipe("qwen3_8b_base"))
    config = compose([*recipe("qwen3_8b_base"), "run.name=dry"])
    assert yaml.safe_load(text) == OmegaConf.to_container(config, resolve=True)


def test_verl_is_not_imported(folder):
    arguments = ["train", "--dry-run", *recipe("qwen3_8b_base")]
    code = f"import sys; from cppo_verl.cli import main; print('#', main({arguments!r}), sorted("
    code += "{'verl', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "# 0 []", done.stderr


def flat(node, key=""):
    if isinstance(node, dict) and node:
        return {name: value for part in node for name, value in flat(node[part], f"{key}.{part}".lstrip(".")).items()}
    return {key: node}


@pytest.mark.parametrize(
    ("name", "defaults"),
    [("qwen3_8b_base", "_generated_ppo_trainer"), ("qwen3_30b_a3b_base", "_generated_ppo_megatron_trainer")],
)
def test_every_difference_is_listed_once(printed, name, defaults):
    """Against the flat file that verl generates from its own configs."""
    _, sections = printed(*recipe(name))
    listed = [line.strip() for line in sections["difference"]]
    assert listed.pop() == "not listed, for this run does not build them: critic, distillation, actor_rollout_ref.ref"
    own = listed.index("nodes of cppo_verl's own")
    listed, nodes = listed[:own], pairs(listed[own + 1 :])
    listed.remove("these follow by verl's own references")
    keys = [line.partition(": ")[0] for line in listed]
    assert len(keys) == len(set(keys))
    config = OmegaConf.to_container(compose([*recipe(name), "run.name=dry"]), resolve=True)
    ours = flat(config)
    verl = flat(OmegaConf.to_container(OmegaConf.load(verl_config_dir() / f"{defaults}.yaml"), resolve=True))
    unused = ("critic.", "distillation.", "actor_rollout_ref.ref.")
    expected = {key for key, value in ours.items() if key not in verl or verl[key] != value} - {"model_engine"}
    expected = {key for key in expected if not key.startswith(unused)}
    # Nodes that refer to one of ours are one line each.
    for node in (f"{ACTOR}.policy_loss.method", f"{ACTOR}.policy_loss.divergence"):
        expected = {key for key in expected if not key.startswith(f"{node}.")} | {node}
    assert nodes.keys() == {"divergence", "method", "run", "thresholds"}
    for node, settings in nodes.items():
        leaves = {key for key in expected if key.startswith(f"{node}.") and not key.endswith("._target_")}
        assert {f"{node}.{setting.partition('=')[0]}" for setting in re.split(r", (?=[\w.]+=)", settings)} == leaves
    assert set(keys) == {key for key in expected if key.partition(".")[0] not in nodes}
    for line in listed:
        before, arrow, after = line.partition(": ")[2].partition(" -> ")
        assert before != after if arrow else before.endswith("(not a key of verl's)")


def test_a_part_of_verl_that_is_used_is_listed(printed):
    _, sections = printed(*recipe("qwen3_8b_base"), f"{ACTOR}.use_kl_loss=true")
    listed = [line.strip() for line in sections["difference"]]
    assert "actor_rollout_ref.ref.log_prob_use_dynamic_bsz: false -> true" in listed
    assert listed[-1] == "not listed, for this run does not build them: critic, distillation"


def test_on_a_terminal_only_the_report(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        assert main(["train", "--dry-run", "run.name=dry", *recipe("qwen3_8b_base")]) == 0
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("difference from verl's defaults")
    assert re.fullmatch(r"the resolved configuration, \d{4} lines of YAML: add > FILE", lines[-1])
    assert len(lines) < 120


def test_known_differences(printed):
    _, sections = printed(*recipe("qwen3_8b_base"))
    found = pairs(line.strip() for line in sections["difference"] if ": " in line)
    assert found[f"{ACTOR}.strategy"] == "fsdp -> fsdp2"
    assert found[f"{ROLLOUT}.gpu_memory_utilization"] == "0.5 -> 0.7"
    assert ", name=cppo, delta=0.15, " in found["method"]
    assert found["algorithm.adv_estimator"] == "gae -> grpo"
    assert f"{ACTOR}.ppo_max_token_len_per_gpu" not in found  # verl's own 16384


# Table 3's numbers multiplied out by hand: responses, updates, optimizer steps, tokens, queue, checkpoints, disk.
DERIVED = {
    "qwen3_1.7b": ("512", "2", "2,240", "4,718,592", "671 MB", "20.6 GB", "61.9 GB (3 kept of 112 saved)", "14.34"),
    "qwen3_1.7b_base": ("512", "2", "1,360", "4,718,592", "671 MB", "20.6 GB", "61.9 GB (3 kept of 68 saved)", "8.70"),
    "qwen3_8b_base": (
        "1,024",
        "4",
        "1,960",
        "9,437,184",
        "1.34 GB",
        "98.3 GB",
        "295 GB (3 kept of 49 saved)",
        "12.54",
    ),
    "qwen3_30b_a3b_base": (
        "4,096",
        "8",
        "4,480",
        "71,303,168",
        "10.7 GB",
        "427 GB",
        "1.28 TB (3 kept of 56 saved)",
        "28.67",
    ),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_quantities_of_the_papers_runs(printed, name):
    _, sections = printed(*recipe(name))
    found = pairs(sections["derived"])
    shown = [
        found["responses per step"].split()[0],
        found["updates per iteration"].split()[0],
        found["optimizer steps of the run"],
        found["tokens per step, at most"].split()[0],
        found["Top-K queue per step, at most"].partition(" (")[0],
        found["checkpoint"].partition(" (")[0],
        found["disk for checkpoints"],
        found["epochs over the data"].split()[0],
    ]
    assert tuple(shown) == DERIVED[name]
    assert found["samples per validation"] == "1,440 (90 problems x 16)"


def test_ranks_and_micro_batches(printed):
    found = pairs(printed(*recipe("qwen3_30b_a3b_base"))[1]["derived"])
    assert found["GPUs"] == "32 (4 nodes x 8; 8 data-parallel ranks, each of 4 GPUs that work on the same responses)"
    assert found["responses of a minibatch per rank"] == "64"  # 32 prompts x 16 over 8
    assert found["micro-batches of a minibatch per rank"].startswith("at most 64 ")  # 17,408 of 32,768 tokens each
    found = pairs(printed(*recipe("qwen3_1.7b_1gpu"))[1]["derived"])
    assert found["micro-batches of a minibatch per rank"].startswith(
        "at most 43 "
    )  # 128 responses, 3 of 5,120 in 16,384
    kept = pairs(printed(*recipe("qwen3_8b_base"), "trainer.max_actor_ckpt_to_keep=null")[1]["derived"])
    assert kept["disk for checkpoints"] == "4.82 TB (49 kept of 49 saved)"


def rows_of(sections):
    """The memory table: part -> update, weight sync, generation."""
    return {line.split()[0]: [float(number) for number in line.split()[1:4]] for line in sections["memory"][1:10]}


def assert_adds_up(table):
    assert list(table)[-1] == "total"
    for column in range(3):
        parts = [row[column] for part, row in table.items() if part != "total"]
        assert table["total"][column] == pytest.approx(sum(parts), abs=0.04)


def test_memory_of_the_8b_run(printed):
    text, sections = printed(*recipe("qwen3_8b_base"))
    assert "a card of 80 GiB is assumed" in text
    assert "8,190,735,360 parameters by configs/facts/Qwen3-8B.json" in text
    table = rows_of(sections)
    share = 8_190_735_360 * 4 / 8 / 2**30
    assert table["weights"] == pytest.approx([share] * 3, abs=0.006)
    assert table["optimizer"] == pytest.approx([2 * share] * 3, abs=0.006)
    assert table["vllm"] == pytest.approx([0, 8_190_735_360 * 2 / 2**30, 56], abs=0.006)
    assert_adds_up(table)


def test_the_optimizers_step_is_the_peak_of_a_small_micro_batch(printed):
    """On a GPU; 32.11 GiB were measured there at this shape (docs/gpu.md)."""
    small = ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096", "data.max_response_length=256")
    _, sections = printed(*recipe("qwen3_1.7b_1gpu"), *small, "data.max_prompt_length=64")
    table = rows_of(sections)
    assert table["step"] == [table["weights"][0], 0, 0]
    assert table["logits"] == table["activations"] == [0, 0, 0]
    assert table["total"][0] == pytest.approx(32.05, abs=0.01)
    assert_adds_up(table)


def test_the_host_holds_what_is_offloaded(printed):
    _, sections = printed(*recipe("qwen3_30b_a3b_base"))
    found = pairs(sections["host"][:2])
    table = {line.split()[0]: float(line.split()[1]) for line in sections["memory"][1:9]}
    offloaded = 8 * (table["weights"] + table["optimizer"])  # 8 GPUs a node; both are 0 while vLLM generates
    assert float(found["offloaded weights and optimizer"].removesuffix(" GiB")) == pytest.approx(offloaded, abs=0.2)
    assert found["Top-K queue"].startswith("up to 10.7 GB")


# Bytes a parameter, all on one node: float32 weights, gradients and Adam's two moments.
@pytest.mark.parametrize(
    ("offload", "size"),
    [("param_offload", 4), ("optimizer_offload", 8), ("offload_policy", 16), ("reshard_after_forward", 0)],
)
def test_each_offload_of_fsdp(printed, offload, size):
    _, sections = printed(*recipe("qwen3_8b_base"), f"{ACTOR}.fsdp_config.{offload}=true")
    expected = 8_190_735_360 * size / GIB
    assert pairs(sections["host"][:1])["offloaded weights and optimizer"] == f"{expected:.1f} GiB"


def test_the_card_is_that_of_nvidia_smi(printed, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 81559\necho 40960\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    text, sections = printed(*recipe("qwen3_8b_base"), "trainer.project_name=card")
    assert "card by nvidia-smi" in text
    assert rows_of(sections)["vllm"] == [0, 15.26, 28.00]
    assert any(f"{ROLLOUT}.gpu_memory_utilization=0.7" in line for line in sections["warnings"])


def test_an_unknown_model_is_said_in_one_line(printed, folder):
    unknown = [*recipe("qwen3_8b_base"), "actor_rollout_ref.model.path=Some/Model-9B"]
    text, sections = printed(*unknown)
    assert "# memory per GPU: not estimated: no config.json of Some/Model-9B here" in text
    assert sections["memory"] == []
    assert "checkpoint" not in pairs(sections["derived"])
    snapshot = folder / "hub" / "models--Some--Model-9B" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    text, _ = printed(*unknown, "trainer.project_name=cached")
    assert "not estimated: Some/Model-9B (model_type mamba) is not" in text


@pytest.mark.parametrize("name", [*DERIVED, "qwen3_8b_base_megatron", "qwen3_1.7b_1gpu"])
def test_the_recipes_have_nothing_to_warn_about(printed, name):
    assert printed(*recipe(name))[1]["warnings"] == []


WARNINGS = {
    "budget": ([f"{ACTOR}.ppo_max_token_len_per_gpu=9000"], f"{ACTOR}.ppo_max_token_len_per_gpu", "give at least 9216"),
    "few": (["trainer.nnodes=16"], f"{ACTOR}.ppo_mini_batch_size", "leaves 2 responses"),
    "one update": ([f"{ACTOR}.ppo_mini_batch_size=128"], f"{ACTOR}.ppo_mini_batch_size", "no trust region acts"),
    "never exceeded": (["method.delta=1.5"], "method.delta", "at most 1"),
    "other unit": (["divergence=topk_kl", "method.delta=0.15"], "method.delta", "threshold of a total variation"),
    "other unit, DPPO": (["method=dppo", "divergence=binary_kl", "method.delta=0.15"], "method.delta", "in nats"),
    "TRM on TV": (
        ["method=trm_max", "divergence=topk_tv", "method.allow_tv=true"],
        "method.delta_max",
        "is a total variation",
    ),
    "KL term": ([f"{ACTOR}.use_kl_loss=true"], f"{ACTOR}.use_kl_loss", "reference model"),
    "entropy": ([f"{ACTOR}.entropy_coeff=0.01"], f"{ACTOR}.entropy_coeff", "no such term"),
    "heads": (
        [f"{ROLLOUT}.tensor_model_parallel_size=3"],
        f"{ROLLOUT}.tensor_model_parallel_size",
        "32 attention heads",
    ),
    "length": ([f"{ROLLOUT}.max_model_len=4096"], f"{ROLLOUT}.max_model_len", "cuts responses"),
    "prefill": ([f"{ROLLOUT}.enable_chunked_prefill=false"], f"{ROLLOUT}.max_num_batched_tokens", "at least 9216"),
    "one sample": ([f"{ROLLOUT}.val_kwargs.n=1"], f"{ROLLOUT}.val_kwargs.n", "one sample"),
    "same samples": ([f"{ROLLOUT}.val_kwargs.do_sample=false"], f"{ROLLOUT}.val_kwargs.n", "16 times"),
    "endless": (["trainer.total_training_steps=null"], "trainer.total_training_steps", "39000 steps"),
    "epochs": (["trainer.total_epochs=2"], "trainer.total_epochs", "after 78 steps"),
    "unsaved": (["trainer.save_freq=-1"], "trainer.save_freq", "nothing is saved"),
    "unvalidated": (["trainer.test_freq=-1"], "trainer.test_freq", "nothing is validated"),
    "disk": (["trainer.max_actor_ckpt_to_keep=null"], "trainer.max_actor_ckpt_to_keep", "4.82 TB"),
    "update": (
        [f"{ACTOR}.ppo_max_token_len_per_gpu=131072", "actor_rollout_ref.model.enable_gradient_checkpointing=false"],
        "the update takes an estimated",
        "enable_gradient_checkpointing=true",
    ),
    "generation": ([f"{ROLLOUT}.gpu_memory_utilization=0.9"], f"{ROLLOUT}.gpu_memory_utilization", "give at most 0.75"),
    "no room": (
        [f"{ROLLOUT}.gpu_memory_utilization=0.15"],
        f"{ROLLOUT}.gpu_memory_utilization",
        "no room for one response",
    ),
}


@pytest.fixture(scope="module")
def eight_billion(folder):
    return compose(recipe("qwen3_8b_base"))


@pytest.mark.parametrize("name", WARNINGS)
def test_each_warning(eight_billion, name):
    overrides, setting, text = WARNINGS[name]
    if any(word.startswith(("method=", "divergence=")) for word in overrides):
        config = compose([*recipe("qwen3_8b_base"), *overrides])
    else:
        config = eight_billion.copy()
        for key, value in (word.split("=") for word in overrides):
            OmegaConf.update(config, key, yaml.safe_load(value))
    model, _ = find_model(config.actor_rollout_ref.model)
    found = [*cautions(config, model, estimate(config, model, 80 * GIB), 80 * GIB)]
    assert any(line.startswith(setting) and text in line for line in found), found


@pytest.fixture(scope="module")
def thirty_billion(folder):
    return compose(recipe("qwen3_30b_a3b_base"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({f"{ACTOR}.megatron.expert_model_parallel_size": 3}, "=3 does not divide the model's 128 experts"),
        ({f"{ACTOR}.megatron.tensor_model_parallel_size": 5}, "=5 does not divide the model's 32 attention heads"),
        ({"actor_rollout_ref.model.path": "Qwen/Qwen3-8B-Base"}, "=8: the model has no experts"),
        ({"trainer.nnodes": 1}, "the update takes an estimated 74 GiB of 80: fewer tokens a micro-batch, more GPUs"),
        ({"trainer.nnodes": 1, "trainer.n_gpus_per_node": 4}, "gradients and optimizer alone are too large; more GPUs"),
        ({f"{ROLLOUT}.gpu_memory_utilization": 0.95}, "give at most 0.9, or more GPUs"),
    ],
)
def test_megatrons_warnings_name_what_is_not_in_force(thirty_billion, overrides, text):
    config = thirty_billion.copy()
    for key, value in overrides.items():
        OmegaConf.update(config, key, value)
    model, _ = find_model(config.actor_rollout_ref.model)
    found = [*cautions(config, model, estimate(config, model, 80 * GIB), 80 * GIB)]
    assert any(text in line for line in found), found
    assert not any("recompute" in line or "offload" in line for line in found)


def test_warnings_are_seen_where_the_report_goes_to_a_file(folder, capsys):
    assert main(["train", "--dry-run", "run.name=dry", *recipe("qwen3_8b_base"), "trainer.save_freq=-1"]) == 0
    told = capsys.readouterr().err
    assert "# warning: trainer.save_freq=-1: nothing is saved" in told
    assert "# checked: cppo over topk_tv, 1 warning; nothing was started" in told


def test_a_field_that_verl_lacks(printed):
    """Hydra adds it without a word; verl's dataclass refuses it in the first worker."""
    field = f"{ACTOR}.fsdp_config.grad_offload"
    _, sections = printed(*recipe("qwen3_8b_base"), f"+{field}=true")
    (line,) = sections["warnings"]
    assert line.startswith(f"{field}: verl's FSDPEngineConfig has no such field")


def test_the_quickstart_has_nothing_to_warn_about(printed, folder, live_assets):
    quickstart = ["platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", "data.train_batch_size=32"]
    text, sections = printed(*quickstart)
    assert "# warnings: none" in text
    assert sections["memory"][0].split()[0] == "MiB"
    wide = f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"
    settings = json.loads((live_assets / "model" / "config.json").read_text())
    (folder / "wide").mkdir()
    (folder / "wide" / "config.json").write_text(json.dumps({**settings, "vocab_size": 151936}))
    assert printed(*quickstart, "actor_rollout_ref.model.path=wide")[1]["warnings"] == []
    _, sections = printed(*quickstart, "actor_rollout_ref.model.path=wide", f"{wide}=16")
    assert sections["warnings"] == [f"{wide}=16: the embedding takes 75 and is sent whole; give more"]


def test_a_model_folder_of_another_machine_is_not_estimated(printed):
    """Its path is no hub id either, and the hub's library says so by an exception."""
    text, _ = printed(*recipe("qwen3_8b_base"), "actor_rollout_ref.model.path=/no/such/model")
    assert "# memory per GPU: not estimated: no config.json of /no/such/model here" in text
