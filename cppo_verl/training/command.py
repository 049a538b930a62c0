"""``cppo train``."""

import sys

from omegaconf import DictConfig, OmegaConf

from cppo_verl.config.compose import compose
from cppo_verl.config.validate import validate
from cppo_verl.dry_run.room import lacking
from cppo_verl.problems import ConfigError
from cppo_verl.run.terminal import say, warn


def train(overrides: list[str], dry_run: bool) -> int:
    """Compose, check and run; with ``dry_run`` describe, for whatever machine it is meant. Returns the exit status."""
    config = compose(overrides)
    absent = [*validate(config, planned=dry_run), *lacking(config)]
    if absent and not dry_run:
        raise ConfigError.of(absent)
    for problem in absent:
        warn(f"cppo train: not on this machine: {problem.text}")
    if dry_run:
        _describe(config)
        return 0
    from cppo_verl.training.launcher import launch

    return launch(config, ["cppo", "train", *overrides])


def _describe(config: DictConfig) -> None:
    """On a terminal without the configuration; in a file or pipe as comments around it."""
    from cppo_verl.dry_run import describe

    text = OmegaConf.to_yaml(config, resolve=True)
    terminal = sys.stdout.isatty()
    lines, cautions = describe(config)
    for line in lines:
        say(line if terminal else f"# {line}")
    if terminal:
        say(f"the resolved configuration, {text.count(chr(10))} lines of YAML: add > FILE")
    else:
        print(text)  # as it is: a file to be read again
    for caution in () if terminal else cautions:
        warn(f"# warning: {caution}")
    warned = f", {len(cautions)} warning{'s' * (len(cautions) > 1)}" if cautions else ""
    checked = f"{config.method.name} over {config.divergence.name}{warned}"
    warn(f"# checked: {checked}; nothing was started")
