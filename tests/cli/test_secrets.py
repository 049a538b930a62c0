"""Secrets never leave the environment: not into settings, Ray's runtime_env, manifests, trackers or logs."""

import json
import os
import stat
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from cppo_verl.adapters.driver.main import ray_settings
from cppo_verl.cli import main
from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.run import confidential
from cppo_verl.run.manifest import manifest
from cppo_verl.run.supervisor import RUN_FOLDER
from cppo_verl.training.launcher import environment, prepare_folder

CANARIES = {
    "WANDB_API_KEY": "canary-wandb-0f3a",
    "HF_TOKEN": "canary-hf-77b1",
    "HUGGING_FACE_HUB_TOKEN": "canary-hub-2c9d",
    "AWS_ACCESS_KEY_ID": "canary-aws-id-e1",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-5588",
    "AWS_SESSION_TOKEN": "canary-session-41",
    "OPENAI_API_KEY": "canary-openai-9a",
    "VLLM_API_KEY": "canary-vllm-93d0",
    "CPPO_DB_PASSWORD": "canary-password-6",
    "VERL_CREDENTIALS": "canary-credential",
    "HF_PROXY": "http://me:canary-proxy-1@proxy:3128",
}


@pytest.fixture
def base(live_assets, tmp_path):
    return [
        *("platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}"),
        *(f"run.dir={tmp_path}", "run.name=new"),
    ]


@pytest.fixture
def canaries(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", CANARIES)
def test_secrets_are_known(name):
    assert confidential.is_secret(name, CANARIES[name])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("HF_HOME", "/shared/hf"),
        ("AWS_REGION", "us-east-1"),
        ("WANDB_BASE_URL", "https://wandb.example.org"),
        ("eos_token", "<|im_end|>"),
        ("prompt_key", "prompt"),
        ("max_num_batched_tokens", "8192"),
        ("use_auth_token", "true"),
    ],
)
def test_what_is_no_secret(name, value):
    assert not confidential.is_secret(name, value)


def test_no_setting_of_ours_or_verls_is_taken_for_a_secret(base):
    for platform in ("cpu", "gpu"):
        config = configuration.compose([*base, f"platform={platform}"])
        assert list(confidential.secrets_in(OmegaConf.to_container(config, resolve=True), {})) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ray_kwargs.ray_init.runtime_env.env_vars.HF_TOKEN", "canary-typed-in"),
        ("ray_kwargs.ray_init.runtime_env.env_vars.INNOCENT", "${oc.env:OPENAI_API_KEY}"),
        ("reward.custom_reward_function.reward_kwargs.api_key", "canary-typed-in"),
        ("reward.custom_reward_function.reward_kwargs.judge", "${oc.env:AWS_SECRET_ACCESS_KEY}"),
        ("actor_rollout_ref.rollout.engine_kwargs.vllm.headers", "[x,'key ${oc.env:VLLM_API_KEY}']"),
        ("trainer.wandb_proxy", "'http://me:canary-typed-in@proxy:3128'"),
    ],
)
def test_a_secret_in_a_setting_is_refused_without_being_shown(base, canaries, capsys, tmp_path, key, value):
    assert main(["train", *base, f"++{key}={value}"]) == 2
    message = capsys.readouterr().err
    assert f"cppo train: {key}: a secret would stand in config.yaml, logs and trackers; leave the setting" in message
    assert "canary" not in message
    assert list(tmp_path.iterdir()) == []


def test_values_in_place_of_names_are_refused(base):
    with pytest.raises(
        configuration.ConfigError, match=r"private_variables: give the names of variables, not their values"
    ):
        validate(configuration.compose([*base, "run.private_variables=[HF_TOKEN,sk-123]"]))


@pytest.fixture
def cluster():
    return OmegaConf.create({"num_cpus": 64, "include_dashboard": False, "address": "10.0.0.1:6379"})


def test_secrets_are_not_sent_to_a_cluster_in_its_runtime_environment(cluster):
    """Ray writes it into its logs and shows it in its state API; verl prints it."""
    variables = {**CANARIES, "HF_HOME": "/hf", "CPPO_MINE": "canary-private"}
    settings = OmegaConf.to_container(ray_settings(cluster, variables, ["CPPO_MINE", "HF_TOKEN"]))
    assert settings == {
        "runtime_env": {"env_vars": {"HF_HOME": "/hf"}, "worker_process_setup_hook": confidential.RECEIVE},
        "address": "10.0.0.1:6379",
    }
    assert "worker_process_setup_hook" not in ray_settings(cluster, {}, ["CPPO_MINE"]).runtime_env


def test_workers_read_them_from_a_file_for_the_user_alone_that_goes_with_the_run(tmp_path):
    (tmp_path / confidential.FILE).write_text("of a killed attempt, readable for all")
    script = "from ray._common.utils import load_class; import os, sys\n"
    script += "load_class(sys.argv[1])(); print(os.environ.get('HF_TOKEN'))"
    worker = [sys.executable, "-c", script, confidential.RECEIVE]
    variables = {**os.environ, RUN_FOLDER: str(tmp_path)}
    with confidential.shared(tmp_path, {"HF_TOKEN": "canary"}):
        assert stat.S_IMODE((tmp_path / confidential.FILE).stat().st_mode) == 0o600
        done = subprocess.run(worker, env=variables, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("canary\n", "")
    assert list(tmp_path.iterdir()) == []
    variables.pop("HF_TOKEN", None)
    done = subprocess.run(worker, env=variables, capture_output=True, text=True)
    assert done.stdout == "None\n"
    absent = f"{tmp_path / confidential.FILE} cannot be read on this node (No such file or directory)"
    assert done.stderr == f"cppo: {absent}\n"


def test_commands_are_written_down_without_secrets(canaries):
    words = [
        *("cppo", "eval", "runs/x", "+a.b.HF_TOKEN=typed-in", f"c=Bearer {CANARIES['OPENAI_API_KEY']}"),
        *("d=s3://me:typed-in@host/x", "e.eos_token=<|end|>", "api_key=typed-in", "++TOKEN=typed-in"),
    ]
    assert confidential.redacted(words, os.environ) == [
        *("cppo", "eval", "runs/x", "+a.b.HF_TOKEN=***", "c=Bearer ***"),
        *("d=s3://***@host/x", "e.eos_token=<|end|>", "api_key=***", "++TOKEN=***"),
    ]
    written = json.dumps(manifest(words))
    assert "typed-in" not in written
    assert "canary" not in written


def test_what_a_run_of_a_cluster_writes_down_has_no_canary(base, canaries, cluster, tmp_path):
    """Every file of the folder, byte by byte; what verl prints and gives to its trackers is the configuration."""
    overrides = [*base, "trainer.logger=[console,wandb]"]
    config = configuration.compose(overrides)
    validate(config)
    prepare_folder(config, tmp_path / "new", ["cppo", "train", *overrides, f"x={CANARIES['HF_TOKEN']}"])
    variables = environment(config)
    assert variables["HF_TOKEN"] == CANARIES["HF_TOKEN"]  # the driver itself has them
    config.ray_kwargs.ray_init = ray_settings(cluster, variables, config.run.private_variables)
    assert "HF_HUB_OFFLINE" in config.ray_kwargs.ray_init.runtime_env.env_vars
    shown = OmegaConf.to_yaml(config, resolve=True)
    assert [value for value in CANARIES.values() if value in shown] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"config.yaml", "manifest.json"}
    for path in files:
        assert [value for value in CANARIES.values() if value.encode() in path.read_bytes()] == []
