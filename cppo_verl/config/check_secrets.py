"""Whether a setting holds a secret, which would stand in config.yaml, in logs and with trackers."""

import os
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from cppo_verl.problems import Problem, about
from cppo_verl.run.confidential import secrets_in


def check_secrets(config: DictConfig) -> Iterator[Problem]:
    """By its name (``...api_key``, ``HF_TOKEN``), by a URL with a password, or as the value of a secret variable."""
    for key in secrets_in(OmegaConf.to_container(config, resolve=True), os.environ):
        yield about(
            key,
            ": a secret would stand in config.yaml, logs and trackers; leave the setting out, set a variable in the "
            "environment of this command, and for a running Ray cluster name it in run.private_variables",
        )
