"""Checks of a composed configuration: what cannot work is named before Ray starts or verl is imported."""

import re
from collections.abc import Callable, Iterator

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.adapters import compat
from cppo_verl.config import check_files, check_kept, check_machine, check_run, check_secrets, check_settings
from cppo_verl.config.schema import check_schema
from cppo_verl.problems import ConfigError, Problem


def validate(config: DictConfig, planned: bool = False) -> list[Problem]:
    """Raise ConfigError listing every problem found. Imports torch (to build the method), never verl or Ray.

    Args:
        planned: the run is for another machine; files that are absent here are returned instead.
    """
    problems = list(check_schema(config))
    blamed = {problem.key for problem in problems}
    for check in _CHECKS:
        try:
            problems += [problem for problem in check(config) if not _follows(problem, blamed)]
        except (OmegaConfBaseException, AttributeError, TypeError, ValueError, ArithmeticError) as error:
            if not blamed:  # else the value that could not be compared or divided by has been named
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                text = f"a setting has a value of the wrong type: {reason}"
                problems.append(Problem(getattr(error, "full_key", None) or "settings", text))
    problems = list(dict.fromkeys(problems))
    refusing = [problem for problem in problems if not (planned and problem.only_here)]
    if refusing:
        raise ConfigError.of(refusing)
    return problems


def _follows(problem: Problem, blamed: set[str]) -> bool:
    """Whether it is about a setting whose value has been refused already, or computed from it."""
    named = re.findall(r"[\w.]+", problem.text)
    short = {".".join(key.split(".")[-2:]) for key in blamed}  # as in "ppo_mini_batch_size x rollout.n"
    return problem.key in blamed or not short.isdisjoint(named) or not blamed.isdisjoint(named)


def _check_versions(config: DictConfig) -> Iterator[Problem]:
    try:
        compat.check_verl_version()
    except compat.IncompatibleError as error:
        yield Problem("versions", str(error))


_CHECKS: tuple[Callable[[DictConfig], Iterator[Problem]], ...] = (
    _check_versions,
    check_secrets.check_secrets,
    check_settings.check_method,
    check_settings.check_divergence,
    check_settings.check_verl_mode,
    check_settings.check_async,
    check_settings.check_rollout,
    check_settings.check_engine,
    check_settings.check_parallelism,
    check_files.check_model,
    check_files.check_megatron,
    check_files.check_data,
    check_files.check_reward,
    check_files.check_tools,
    check_run.check_run,
    check_run.check_checkpoints,
    check_kept.check_owner,
    check_kept.check_earlier_attempts,
    check_run.check_logger,
    check_machine.check_machine,
)
