"""``cppo bench``: compose a run that swaps variants, train it, show the ratios."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cppo_verl.bench.figures import summarize
from cppo_verl.bench.model import random_model, shapes, tiny_model
from cppo_verl.bench.variants import OURS
from cppo_verl.config.compose import compose, run_folder
from cppo_verl.config.validate import validate
from cppo_verl.problems import ConfigError
from cppo_verl.training.launcher import launch


def bench(overrides: list[str], costs: Path | None, quick: bool, schedule: bool, write: bool, **options: Any) -> int:
    """A step against others, or one of the other measurements; returns the exit status."""
    if overrides and (costs is not None or quick or schedule):
        raise ConfigError(f"--costs, --quick and --schedule take no settings; got {' '.join(overrides)}")
    if write and not quick:
        raise ConfigError("--write renews the ratios of --quick; give both")
    if costs is not None:
        from cppo_verl.bench.costs import costs as measure_costs

        return measure_costs(costs)
    if quick:
        from cppo_verl.bench.quick import quick as compare

        return compare(write)
    if schedule:
        from cppo_verl.bench.schedule import schedule as predict

        return predict()
    return bench_step(overrides, **options)


def bench_step(overrides: list[str], rounds: int, against: list[str], vocabulary: int | None, shape: str | None) -> int:
    """Train ``rounds`` rounds of one step of each variant; returns the exit status.

    Args:
        overrides: Hydra's, as for ``cppo train``.
        against: variants other than ours.
        vocabulary: use a tiny random model with this many tokens.
        shape: use random weights of this model's shape (configs/facts/).
    """
    if rounds < 2:
        raise ConfigError("--rounds must be 2 or more; an interval needs at least two")
    if shape is not None and shape not in shapes():
        raise ConfigError(f"--shape {shape}: not known; there are {', '.join(shapes())} (configs/facts/)")
    variants = [OURS, *against]
    fixed = [
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={len(variants) * (rounds + 1)}",
        f"+bench.rounds={rounds}",
        f"+bench.variants=[{','.join(variants)}]",
        "+bench.divergence=null",
        "+bench.binary=null",
    ]
    if vocabulary is not None or shape is not None:
        model = tiny_model(vocabulary) if vocabulary is not None else random_model(str(shape))
        fixed += [f"actor_rollout_ref.model.path={model}"]
    config = compose([*overrides, *fixed])
    validate(config)
    # Taken out of the divergence node, which a step of the "binary" variant replaces.
    config.bench.divergence = OmegaConf.to_container(config.divergence, resolve=True)
    config.bench.binary = OmegaConf.to_container(compose(["divergence=binary_tv"]).divergence, resolve=True)
    command = ["cppo", "bench", "--rounds", str(rounds), "--against", *against]
    command += [] if vocabulary is None else ["--vocabulary", str(vocabulary)]
    command += [] if shape is None else ["--shape", shape]
    status = launch(config, [*command, "--", *overrides], module="cppo_verl.bench.rounds")
    for name, text in summarize(run_folder(config)) if status == 0 else ():
        print(f"{name:<32} {text}")
    return status
