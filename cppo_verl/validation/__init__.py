"""Checks of a composed configuration: what cannot work is named before Ray starts or verl is imported."""

from collections.abc import Callable, Iterator

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.adapters import compat
from cppo_verl.config import ConfigError
from cppo_verl.validation import files, run, settings


def validate(config: DictConfig, planned: bool = False) -> list[str]:
    """Raise ConfigError listing every problem found. Imports torch (to build the method), never verl or Ray.

    Args:
        planned: the run is for another machine; files that are absent here are returned instead.
    """
    problems: list[str] = []
    for check in _CHECKS:
        try:
            problems += check(config)
        except (OmegaConfBaseException, TypeError) as error:  # a value of a type that cannot be compared, e.g. null
            problems.append(f"a setting has a value of the wrong type: {str(error).splitlines()[0]}")
    problems = list(dict.fromkeys(problems))
    absent: list[str] = [problem for problem in problems if planned and isinstance(problem, files.Absent)]
    if len(problems) > len(absent):
        raise ConfigError("\n".join(problem for problem in problems if problem not in absent))
    return absent


def _check_versions(config: DictConfig) -> Iterator[str]:
    try:
        compat.check_verl_version()
    except compat.IncompatibleError as error:
        yield str(error)


_CHECKS: tuple[Callable[[DictConfig], Iterator[str]], ...] = (
    _check_versions,
    settings.check_method,
    settings.check_divergence,
    settings.check_verl_mode,
    settings.check_rollout,
    settings.check_engine,
    settings.check_parallelism,
    files.check_model,
    files.check_megatron,
    files.check_data,
    files.check_reward,
    run.check_run,
    run.check_checkpoints,
    run.check_logger,
)
