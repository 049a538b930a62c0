"""``cppo overlap``: what every method would mask of a run's dumped steps, and how far that is what CPPO would mask."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from rich.table import Table

from cppo_verl.inspection.presets import settings_of_all
from cppo_verl.methods import Outcome, Tokens, defined_on
from cppo_verl.problems import ConfigError
from cppo_verl.run.dumps import dumps_of, load
from cppo_verl.run.folder import read_config
from cppo_verl.run.terminal import console, say


class Overlap(NamedTuple):
    """Shares of tokens; a token is masked where its gradient factor is 0 or less."""

    masked: float
    attenuated: float
    """Factor above 0 and below 1."""
    clipped: float | None
    """Weight cut to a bound, gradient kept; None where the method cuts none."""
    of_cppo: float | None
    """Of the tokens that CPPO masks those that this method masks too; None where CPPO masks none."""
    in_cppo: float | None
    """Of the tokens that this method masks those that CPPO masks too; None where it masks none."""


def overlap(run: Path, step: int | None, as_json: bool) -> int:
    """Print a line a method; returns the exit status.

    Raises:
        ConfigError: it is no run, or has no such dumped step.
    """
    config, files = read_config(run), dumps_of(run)
    if step is not None:
        files = [file for file in files if file.parent.name == f"step_{step}"]
    if not files:
        which = "no dumped step" if step is None else f"no dumped step {step}"
        raise ConfigError(f"{run} has {which}; train one with run.dump_steps=[1,2,3]")
    batches = [_tokens(load(file)) for file in files]
    if not any(bool(tokens.valid.any()) for tokens in batches):
        raise ConfigError("the dumped steps have no token in the loss: all groups were skipped")
    kinds = (None, config.divergence.kind)  # thresholds of the other kind say nothing
    chosen = {
        settings["name"]: settings
        for settings in settings_of_all(config)
        if defined_on(get_class(settings["_target_"]), settings) in kinds
    }
    found = compare({name: _outcomes(settings, batches) for name, settings in chosen.items()}, batches)
    tokens = int(sum(batch.valid.sum() for batch in batches))
    if as_json:
        rows = {name: row._asdict() for name, row in found.items()}
        record = {"run": str(run), "tokens": tokens, "divergence": config.divergence.name, "methods": rows}
        say(json.dumps(record, indent=2))
    else:
        say(f"{tokens:,} tokens, {config.divergence.name}; {config.method.name} as trained, others at their defaults")
        _show(found)
    return 0


def compare(outcomes: dict[str, list[Outcome]], batches: list[Tokens]) -> dict[str, Overlap]:
    """Of each method's outcomes on the batches, beside those of "cppo"."""
    valid = torch.cat([tokens.valid.flatten() for tokens in batches])

    def column(name: str, of: Any) -> torch.Tensor:
        return torch.cat([of(outcome).flatten() for outcome in outcomes[name]])[valid]

    masks = {name: column(name, lambda outcome: outcome.gate) <= 0 for name in outcomes}
    reference, found = masks["cppo"], {}
    for name, masked in masks.items():
        gate, both = column(name, lambda outcome: outcome.gate), (masked & reference).sum().item()
        cuts = outcomes[name][0].clipped is not None
        found[name] = Overlap(
            masked.double().mean().item(),
            ((gate > 0) & (gate < 1)).double().mean().item(),
            column(name, lambda outcome: outcome.clipped).double().mean().item() if cuts else None,
            both / reference.sum().item() if reference.any() else None,
            both / masked.sum().item() if masked.any() else None,
        )
    return found


def _outcomes(settings: dict[Any, Any], batches: list[Tokens]) -> list[Outcome]:
    try:
        method = instantiate(settings)
    except InstantiationException as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        raise ConfigError(f"method={settings['name']}: {reason}; config.yaml may be of an older version") from None
    return [method(tokens) for tokens in batches]


def _tokens(dump: dict[str, Any]) -> Tokens:
    pi, mu, advantages = (dump[name].float() for name in ("log_prob", "rollout_log_prob", "advantages"))
    return Tokens(pi, mu, advantages, dump["response_mask"].bool(), dump["divergence"], dump.get("response_seeds"))


def _show(found: dict[str, Overlap]) -> None:
    terminal = console()
    table = Table(box=None, pad_edge=False)
    for place, heading in enumerate(("method", "masked", "attenuated", "clipped", "of CPPO's", "CPPO's of these")):
        table.add_column(heading, justify="right" if place else "left")
    for name, row in found.items():
        table.add_row(name, *("-" if value is None else f"{value:.2%}" for value in row))
    terminal.print(table)
    say(
        "of CPPO's: share of the tokens that cppo masks that this method masks too; the last column the other way round"
    )
