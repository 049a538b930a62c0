"""Composing the configuration of ``cppo train`` from configs/, verl's own defaults and the command line."""

import importlib.util
import os
import re
import time
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.adapters.driver.placement import server_devices
from cppo_verl.checkpoint import retention
from cppo_verl.config import model_folder, own_methods
from cppo_verl.problems import ConfigError
from cppo_verl.run.folder import CONFIG
from cppo_verl.run.machine import ONE_PROCESS, has_gpu

GROUPS = ("method", "divergence", "mode", "platform", "recipe")
_LONGEST_REASON = 400  # characters
# What is looked into before the settings in it are checked.
_NODES = (
    *("run", "data", "method", "divergence", "thresholds", "algorithm", "algorithm.rollout_correction"),
    *("actor_rollout_ref", "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"),
    "actor_rollout_ref.rollout.checkpoint_engine",
    *("reward", "reward.custom_reward_function", "trainer", "trainer.v1", "ray_kwargs", "ray_kwargs.ray_init"),
)


def config_dir() -> Path:
    """The folder of our Hydra configs: inside an installed package, or ``configs/`` of the checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose ``configs/train.yaml`` with command-line overrides. Raises ConfigError with Hydra's reason."""
    for override in overrides:
        _check_word(override)
        _check_choice(override)
    chosen = list(overrides)
    if not any(override.startswith("platform=") for override in overrides):
        recipes = [override.partition("=")[2] for override in overrides if override.startswith("recipe=")]
        # Every other recipe is for GPUs, wherever it is planned.
        on_any = not recipes or recipes[-1] in ("quickstart", "tools", "smollm2", "small", "null")
        chosen.append(f"platform={'gpu' if has_gpu() or not on_any else 'cpu'}")
    # The same folder as pkg://verl.trainer.config, found without importing verl (5 s).
    chosen.append(f"hydra.searchpath=['file://{verl_config_dir()}']")
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            config = hydra_compose("train", overrides=chosen)
        _check_nodes(config)
        _fill_in_run(config)
        OmegaConf.to_container(config, resolve=True)  # what refers to a setting that there is not
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        unknown = re.match(r"Could not override '([^']+)'", str(error))
        raise ConfigError(_no_such_setting(unknown[1], chosen) if unknown else _reason(error)) from None
    return config


def _reason(error: Exception) -> str:
    """Hydra's or omegaconf's, in one line, without what is of use to their authors only."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type=", "reference_type=", "See https"))]
    return "; ".join(kept)[:_LONGEST_REASON]


def _no_such_setting(key: str, overrides: Sequence[str]) -> str:
    """What Hydra says of an unknown key ends in advice to append it, which hides the mistyped name."""
    groups = [override for override in overrides if override.partition("=")[0] in (*GROUPS, "hydra.searchpath")]
    with initialize_config_dir(str(config_dir()), version_base=None):
        config = hydra_compose("train", overrides=groups)
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    siblings = [str(child) for child in node] if isinstance(node, DictConfig) else []
    prefix = f"{parent}." if parent else ""
    near = [] if parent in GROUPS else [path for path in _paths(config) if path.rpartition(".")[2] == name]
    near += [prefix + found for found in get_close_matches(name, {*siblings, *(() if parent else GROUPS)})]
    text = f"{key}: there is no such setting"
    if near:
        text += f", did you mean {' or '.join(near[:3])}?"
    if parent == "method":
        text += f"; method={config.method.name} has {', '.join(child for child in siblings if child[0] != '_')}"
    elif parent.partition(".")[0] in ("actor_rollout_ref", "data", "reward"):
        text += f" (+{key}=... adds a key that verl may read)"
    return text


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, outer ones first."""
    inner = [(prefix + str(name), node._get_node(name)) for name in node]
    yield from (path for path, _ in inner)
    for path, child in inner:
        if isinstance(child, DictConfig):
            yield from _paths(child, f"{path}.")


def choices(group: str) -> list[str]:
    """Names that ``group=`` accepts."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def run_folder(config: DictConfig) -> Path:
    return Path(config.run.dir) / str(config.run.name)


def _check_word(override: str) -> None:
    """One word in Hydra's grammar, whose own messages do not name it."""
    shown = override if len(override) < 80 else f"{override[:80]}..."
    if not re.match(r"\+{0,2}[A-Za-z_][^=]*=|~[A-Za-z_]", override):
        raise ConfigError(f"'{shown}' is no setting: give NAME=VALUE, e.g. method=dppo")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}: {_reason(error)}; quote what is no plain value: \"NAME='...'\"") from None
    is_group = any((folder / parsed.key_or_group).is_dir() for folder in (config_dir(), verl_config_dir()))
    if is_group and parsed.key_or_group not in GROUPS and not isinstance(parsed.value(), str | list | dict):
        raise ConfigError(f"{shown}: it holds settings; give them as {parsed.key_or_group}.NAME=VALUE")
    if parsed.key_or_group == "hydra.searchpath":
        raise ConfigError(
            "hydra.searchpath: the path to verl's settings stands there; give a file's settings as overrides"
        )
    if parsed.key_or_group.partition(".")[0] == "hydra":
        raise ConfigError(
            f"{shown}: Hydra's own settings decide nothing here; run.dir and run.name say where a run is written"
        )


def _check_choice(override: str) -> None:
    """That a group has the chosen file, or an installed package the method, which is then there for Hydra."""
    group, separator, value = override.partition("=")
    if not separator or group not in GROUPS or value in choices(group):
        return
    if group == "method" and own_methods.register(value):
        return
    names = [*choices(group), *(own_methods.names() if group == "method" else ())]
    raise ConfigError(f"{group}={value}: there is no such {group}; choose one of {', '.join(names)}")


def verl_config_dir() -> Path:
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ConfigError("verl is not installed; run scripts/setup.sh")
    return Path(spec.origin).parent / "trainer" / "config"


def _check_nodes(config: DictConfig) -> None:
    for name in _NODES:
        node = OmegaConf.select(config, name)
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{name}={node}: it holds settings; give them as {name}.NAME=VALUE")


def _fill_in_run(config: DictConfig) -> None:
    """Absolute folders (Ray workers may start elsewhere), a default name, and verl's resume keys.

    Values of another type are left for the checks to name.
    """
    if not isinstance(config.run.dir, str) or not config.run.dir.strip():
        raise ConfigError(f"run.dir={config.run.dir}: give a folder")
    config.run.dir = str(Path(os.path.expanduser(config.run.dir)).absolute())
    if config.run.name is None:
        config.run.name = f"{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if config.run.resume == "auto":
        config.run.resume = (run_folder(config) / CONFIG).exists()
    trainer = config.trainer
    if isinstance(trainer.default_local_dir, str):
        trainer.default_local_dir = _absolute(trainer.default_local_dir)
    if trainer.resume_mode == "auto":  # verl would take the folder that it began last, complete or not
        trainer.resume_mode = "disable"
    own = trainer.default_local_dir
    steps = retention.complete_steps(own) if config.run.resume and isinstance(own, str) else []
    if steps and trainer.resume_mode == "disable":
        trainer.resume_mode = "resume_path"
        trainer.resume_from_path = str(retention.step_folder(trainer.default_local_dir, steps[-1]))
    if isinstance(trainer.resume_from_path, str):
        trainer.resume_from_path = _absolute(trainer.resume_from_path).rstrip("/") or "/"
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    engine = rollout.checkpoint_engine
    if isinstance(model.path, str) and os.path.exists(os.path.expanduser(model.path)):
        model.path = str(Path(os.path.expanduser(model.path)).absolute())
    if engine.update_weights_bucket_megabytes is None:
        least = 16 if trainer.device == "cpu" else 2048
        engine.update_weights_bucket_megabytes = max(least, -(-model_folder.largest_tensor(model.path) // 2**20))
    if trainer.device == "cpu" and rollout.engine_kwargs.vllm.get("distributed_executor_backend") is None:
        alone = rollout.tensor_model_parallel_size == 1
        rollout.engine_kwargs.vllm.distributed_executor_backend = ONE_PROCESS if alone else "mp"
    if trainer.device == "cpu" and trainer.v1.trainer_mode == "separate_async":
        if engine.backend == "nccl":
            engine.backend, engine.custom_backend_module = "shared_memory", "cppo_verl.adapters.cpu.weights"
        slots = config.ray_kwargs.ray_init
        counts = (trainer.n_gpus_per_node, rollout.nnodes, rollout.n_gpus_per_node)
        if all(isinstance(count, int) for count in counts) and slots.get("num_gpus") == trainer.n_gpus_per_node:
            slots.num_gpus += server_devices(config)
    reward = config.reward.custom_reward_function
    if isinstance(reward.path, str) and not reward.path.startswith("pkg://"):
        reward.path = _absolute(reward.path)
    turns = rollout.multi_turn
    for key in ("function_tool_path", "tool_config_path"):
        turns[key] = _absolute(turns[key])
    for key in ("train_files", "val_files"):
        files = config.data[key]
        if isinstance(files, ListConfig):
            config.data[key] = [_absolute(file) for file in files]
        elif isinstance(files, str):
            config.data[key] = _absolute(files)


def _absolute(file: Any) -> Any:
    if not isinstance(file, str) or "://" in file:
        return file
    return str(Path(os.path.expanduser(file)).absolute())
