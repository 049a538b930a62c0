"""The table of settings: every row refuses what it should, in a line that names the setting, and takes the defaults."""

from copy import deepcopy

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from cppo_verl.config import schema
from cppo_verl.config.compose import compose, config_dir, verl_config_dir
from cppo_verl.config.validate import validate
from cppo_verl.problems import ConfigError

# Settings by themselves: what was accepted and died after Ray had started, or was accepted without sense.
WRONG = {
    "actor_rollout_ref.actor.optim.lr": [-1, 0, 2, float("nan"), float("inf"), "abc", None, True],
    "actor_rollout_ref.actor.optim.clip_grad": [-1, 0, float("inf"), "abc"],
    "actor_rollout_ref.actor.optim.betas": [[0.9], [0.9, 2], "abc", 0.9, [0.9, "x"]],
    "actor_rollout_ref.actor.optim.weight_decay": [-0.1, "abc"],
    "actor_rollout_ref.actor.optim.lr_warmup_steps": [-2, 0.5, "abc"],
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": [-0.1, 1.5],
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ["linear", 3],
    "actor_rollout_ref.actor.loss_agg_mode": ["mean", None],
    "actor_rollout_ref.actor.entropy_coeff": [float("nan"), "abc"],
    "actor_rollout_ref.actor.kl_loss_coef": [-1, "abc"],
    "actor_rollout_ref.actor.kl_loss_type": ["k4"],
    "actor_rollout_ref.actor.ppo_epochs": [0, 1.5],
    "actor_rollout_ref.actor.use_dynamic_bsz": ["maybe", 1],
    "actor_rollout_ref.actor.fsdp_config.model_dtype": ["int8"],
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": [0, -2],
    "actor_rollout_ref.model.lora_rank": [-1, "abc"],
    "actor_rollout_ref.model.path": [3, ["a"], ""],
    "actor_rollout_ref.rollout.temperature": [0, -1, float("nan"), "abc"],
    "actor_rollout_ref.rollout.top_p": [0, 1.5, "abc"],
    "actor_rollout_ref.rollout.top_k": [-2, "abc"],
    "actor_rollout_ref.rollout.n": [0, 1, 2.5, "abc", True],
    "actor_rollout_ref.rollout.max_model_len": [0, "abc"],
    "actor_rollout_ref.rollout.max_num_seqs": [0],
    "actor_rollout_ref.rollout.dtype": ["int8"],
    "actor_rollout_ref.rollout.gpu_memory_utilization": [0, 1.2, "abc"],
    "actor_rollout_ref.rollout.tensor_model_parallel_size": [0, -1, "abc"],
    "actor_rollout_ref.rollout.agent.num_workers": [0],
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": [0, 0.5, "abc"],
    "actor_rollout_ref.rollout.val_kwargs.n": [0, -1, "abc"],
    "actor_rollout_ref.rollout.val_kwargs.temperature": [-1, float("nan")],
    "actor_rollout_ref.rollout.val_kwargs.top_p": [0, 2],
    "algorithm.gamma": [-1, 2],
    "algorithm.kl_ctrl.type": ["none"],
    "algorithm.rollout_correction.rollout_is": ["token", "sequence"],
    "algorithm.rollout_correction.rollout_rs": ["token"],
    "data.max_prompt_length": [0, -1, 1.5, "abc", None],
    "data.max_response_length": [0, -1, "abc"],
    "data.train_batch_size": [0, "abc", 2.5],
    "data.truncation": ["middlle"],
    "data.dataloader_num_workers": [-1],
    "data.seed": [-1, "abc"],
    "data.train_max_samples": [0, -2],
    "method.delta": [float("inf")],
    "method.ratio_cap": [float("inf")],
    "ray_kwargs.ray_init.num_cpus": [0, -1, "abc"],
    "ray_kwargs.ray_init.object_store_memory": [1],
    "reward.num_workers": [0],
    "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor": [-1],
    "run.dump_steps": ["abc", ["abc"], [0], 2, [1.5]],
    "run.mask_std_0": ["maybe", None],
    "run.poll_interval": ["abc", 0, -1, float("nan"), 100],
    "run.stall_minutes": ["abc", 0, -1, float("inf"), True],
    "run.tool_timeout": ["abc", 0, -1, None, True],
    "actor_rollout_ref.rollout.multi_turn.format": ["xml", None],
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": [0, "many"],
    "run.seed": [-1, "abc", 1.5, 2**32, None, True],
    "thresholds.tv.delta": [0, float("inf"), "abc"],
    "trainer.device": ["tpu", 3],
    "trainer.logger": ["foo", ["console", "foo"], [3]],
    "trainer.nnodes": [0, -1, "two"],
    "trainer.n_gpus_per_node": [0, "abc"],
    "trainer.total_epochs": [0],
    "trainer.total_training_steps": [0, -3, 1.5, "abc"],
    "trainer.save_freq": [-2, "often", None, 1.5],
    "trainer.val_before_train": ["abc"],
    "trainer.resume_mode": ["maybe"],
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": [0],
}
RIGHT = {
    "actor_rollout_ref.actor.optim.lr": [1e-6, 1],
    "actor_rollout_ref.actor.optim.betas": [[0.9, 0.95]],
    "actor_rollout_ref.actor.optim.lr_warmup_steps": [None, -1, 10],
    "actor_rollout_ref.rollout.top_k": [-1, 0, 20],
    "actor_rollout_ref.rollout.val_kwargs.temperature": [0, 0.7],
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": [None, 16],
    "actor_rollout_ref.rollout.max_model_len": [None, 96],
    "algorithm.rollout_correction.rollout_is": [None],
    "data.seed": [None, 0],
    "data.train_max_samples": [-1, 5],
    "method.ratio_cap": [None, 20],
    "ray_kwargs.ray_init.num_cpus": [None, 64],
    "run.dump_steps": [[], [1, 2]],
    "run.private_variables": [None, [], ["HF_TOKEN"]],
    "run.stall_minutes": [None, 0.5, 60],
    "trainer.logger": ["console", ["console", "tensorboard"], None],
    "trainer.save_freq": [-1, 0, 7],
    "trainer.total_training_steps": [None, 1],
}


@pytest.fixture(scope="module")
def composed():
    return compose(["platform=cpu", "run.name=new"])


def problems(config, key, value):
    config = deepcopy(config)
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    return [problem for problem in schema.check_schema(config) if problem.key == key]


@pytest.mark.parametrize("key", WRONG)
def test_refused_in_a_line_that_names_the_setting_and_what_it_takes(composed, key):
    for value in WRONG[key]:
        [problem] = problems(composed, key, value)
        assert problem.text.startswith(f"{key}={value}: give ")
        assert "\n" not in problem.text


@pytest.mark.parametrize("key", RIGHT)
def test_sensible_values_are_taken(composed, key):
    assert [value for value in RIGHT[key] if problems(composed, key, value)] == []


@pytest.mark.parametrize("key", schema.RULES)
def test_every_row_refuses_something(composed, key):
    """A list of lists is what no setting takes; a row whose setting is in none of the configurations is a slip."""
    assert not schema.RULES[key].accepts([["x"]])
    assert known(composed, key), f"{key} is in no configuration"


def known(composed, key):
    if OmegaConf.select(composed, key.rpartition(".")[0]) is not None:
        parent = OmegaConf.select(composed, key.rpartition(".")[0])
        if key.rpartition(".")[2] in parent:
            return True
    elsewhere = [*config_dir().rglob("*.yaml"), *verl_config_dir().glob("_generated*.yaml")]
    name = key.rpartition(".")[2]
    return any(f"{name}:" in path.read_text() for path in elsewhere) or key in OPTIONAL


# Ray's and vLLM's own, which a person adds.
OPTIONAL = (
    "ray_kwargs.ray_init.object_store_memory",
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.rollout.full_determinism",
)


def test_a_wrong_value_that_may_be_a_secret_is_not_shown(composed):
    for value in (["HF_TOKEN", "sk-123"], "sk-123", [5]):
        [problem] = problems(composed, "run.private_variables", value)
        assert problem.text.startswith("run.private_variables: give the names of variables, not their values")


def settings_of(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from settings_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_every_number_and_switch_that_our_files_define_has_a_row():
    """What the divergence and the method take is checked by name and by the method's own class."""
    ours = yaml.safe_load((config_dir() / "train.yaml").read_text())
    run = yaml.safe_load((config_dir() / "run" / "default.yaml").read_text())
    defined = [*settings_of({name: ours[name] for name in ours if name not in ("defaults", "hydra")})]
    defined += settings_of({"run": run})
    numbers = [key for key, value in defined if isinstance(value, bool | int | float)]
    assert [key for key in numbers if key not in schema.RULES and key != "run.resume"] == []


def test_the_defaults_of_every_recipe_and_platform_pass():
    for overrides in (["platform=cpu"], ["recipe=small"], ["platform=gpu", "recipe=qwen3_30b_a3b_base"]):
        assert list(schema.check_schema(compose(overrides))) == []


def test_all_wrong_settings_of_a_command_are_named_and_nothing_else(live_assets, tmp_path):
    """Whatever the other checks would have computed from them."""
    overrides = ["platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}"]
    wrong = {key: values[0] for key, values in WRONG.items() if not isinstance(values[0], float | list)}
    del wrong["thresholds.tv.delta"]  # the method's threshold is the same value, and named as well
    config = compose([*overrides, "run.name=new"])
    for key, value in wrong.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    lines = str(caught.value).splitlines()
    assert {line.partition("=")[0] for line in lines} == set(wrong)
    assert not any("wrong type" in line for line in lines)


def test_one_wrong_setting_is_one_line_whatever_depends_on_it(live_assets, tmp_path):
    overrides = ["platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", f"run.dir={tmp_path}"]
    composed = compose([*overrides, "run.name=new"])
    assert isinstance(composed, DictConfig)
    for key in ("data.max_prompt_length", "actor_rollout_ref.rollout.n", "trainer.nnodes", "data.train_batch_size"):
        for value in (0, "abc", None):
            config = deepcopy(composed)
            OmegaConf.update(config, key, value, merge=False)
            with pytest.raises(ConfigError) as caught:
                validate(config)
            [line] = str(caught.value).splitlines()
            assert line.startswith(f"{key}={value}: give ")
