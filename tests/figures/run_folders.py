"""Run folders as training leaves them, small and with known numbers."""

import copy
import functools
import json

from omegaconf import OmegaConf

from cppo_verl.config.compose import compose
from cppo_verl.run.log import RunLog

BASE = ("platform=cpu", "recipe=quickstart")


@functools.cache
def composed(overrides):
    """The slow part, once for all runs of the same settings."""
    return compose([*BASE, *overrides])


def config_of(folder, *overrides):
    """Text of ``config.yaml``."""
    config = copy.deepcopy(composed(tuple(word for word in overrides if not word.startswith("run.seed="))))
    config.run.name, config.run.dir = folder.name, str(folder.parent)
    for seed in (word.partition("=")[2] for word in overrides if word.startswith("run.seed=")):
        config.run.seed = int(seed)
    return OmegaConf.to_yaml(config, resolve=True)


def make_run(folder, *overrides, metrics=None, validations=None):
    """
    Args:
        metrics: step -> {name: number}.
        validations: step -> {data source: {problem: verdicts}}.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_of(folder, *overrides))
    for step, line in (metrics or {1: {}}).items():
        RunLog(folder).metrics(step, {"training/global_step": step, **line})
    (folder / "validation").mkdir()
    for step, sources in (validations or {}).items():
        with open(folder / f"validation/{step}.jsonl", "w") as file:
            for source, problems in sources.items():
                for problem, verdicts in problems.items():
                    for acc in verdicts:
                        sample = {"input": problem, "gts": "1", "acc": acc, "data_source": source}
                        file.write(json.dumps(sample) + "\n")
    return folder
