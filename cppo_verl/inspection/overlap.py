"""``cppo overlap``: what every method would mask of a run's dumped steps, and how far that is what CPPO would mask."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from rich.table import Table

from cppo_verl import core
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


class Place(NamedTuple):
    """Of the tokens of some place: their number, and shares of them."""

    tokens: int
    both: float
    """Masked by CPPO and by the other method."""
    cppo_alone: float
    other_alone: float
    divergence: float | None
    """Mean D_t of those that CPPO alone masks."""
    divergence_of_both: float | None


def overlap(run: Path, step: int | None, as_json: bool, where: str | None = None) -> int:
    """Print a line a method, or with ``where`` (a method) a line a place; returns the exit status.

    Raises:
        ConfigError: it is no run, or has no such dumped step; ``where`` is none of the methods.
    """
    config, files = read_config(run), dumps_of(run)
    if step is not None:
        files = [file for file in files if file.parent.name == f"step_{step}"]
    if not files:
        which = "no dumped step" if step is None else f"no dumped step {step}"
        raise ConfigError(f"{run} has {which}; train one with run.dump_steps=[1,2,3] or run.inspect_every=50")
    batches = [_tokens(load(file)) for file in files]
    if not any(bool(tokens.valid.any()) for tokens in batches):
        raise ConfigError("the dumped steps have no token in the loss: all groups were skipped")
    kinds = (None, config.divergence.kind)  # thresholds of the other kind say nothing
    chosen = {
        settings["name"]: settings
        for settings in settings_of_all(config)
        if defined_on(get_class(settings["_target_"]), settings) in kinds
    }
    if where is not None and where not in chosen:
        raise ConfigError(f"--where {where}: choose one of {', '.join(chosen)}")
    asked = chosen if where is None else ("cppo", where)
    outcomes = {name: _outcomes(chosen[name], batches) for name in asked}
    found: Mapping[str, NamedTuple] = compare(outcomes, batches) if where is None else places(outcomes, where, batches)
    tokens = int(sum(batch.valid.sum() for batch in batches))
    if as_json:
        rows = {name: row._asdict() for name, row in found.items()}
        record = {"run": str(run), "tokens": tokens, "divergence": config.divergence.name}
        say(json.dumps(record | {"methods" if where is None else "places": rows}, indent=2))
    else:
        say(f"{tokens:,} tokens, {config.divergence.name}; {config.method.name} as trained, others at their defaults")
        _show(found, *(_METHODS if where is None else _places_of(where)))
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


def places(outcomes: Mapping[str, list[Outcome]], other: str, batches: list[Tokens]) -> dict[str, Place]:
    """Where "cppo" and another method differ: by quarter of the response, by sign of the advantage, in all."""
    cppo, masked = ([outcome.gate <= 0 for outcome in outcomes[name]] for name in ("cppo", other))
    in_all: dict[str, list[torch.Tensor]] = {}
    for tokens in batches:
        quarter = core.quarters(tokens.valid)
        for number in range(4):
            in_all.setdefault(f"quarter {number + 1}", []).append(tokens.valid & (quarter == number))
        in_all.setdefault("A > 0", []).append(tokens.valid & (tokens.advantages > 0))
        in_all.setdefault("A < 0", []).append(tokens.valid & (tokens.advantages < 0))
        in_all.setdefault("all", []).append(tokens.valid)

    def counted(name: str) -> Place:
        sums = torch.zeros(6, dtype=torch.float64)
        for here, ours, theirs, tokens in zip(in_all[name], cppo, masked, batches, strict=True):
            alone, both = here & ours & ~theirs, here & ours & theirs
            columns = [here, both, alone, here & ~ours & theirs]
            distances = [(tokens.divergence.double() * flags).nan_to_num().sum() for flags in (alone, both)]
            sums += torch.stack([*(flags.sum().double() for flags in columns), *distances])
        number, both, alone, others, distance, of_both = sums.tolist()
        if not number:
            return Place(0, 0.0, 0.0, 0.0, None, None)
        shares = (both / number, alone / number, others / number)
        return Place(int(number), *shares, distance / alone if alone else None, of_both / both if both else None)

    return {name: counted(name) for name in in_all}


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


_METHODS = (
    ("method", "masked", "attenuated", "clipped", "of CPPO's", "CPPO's of these"),
    "of CPPO's: share of the tokens that cppo masks that this method masks too; the last column the other way round",
)


def _places_of(other: str) -> tuple[tuple[str, ...], str]:
    headings = ("place", "tokens", "both", "cppo alone", f"{other} alone", "D of cppo's alone", "D of both")
    return headings, "shares of the tokens of each place that are masked; mean D_t"


def _show(found: Mapping[str, NamedTuple], headings: Sequence[str], note: str) -> None:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for name, row in found.items():
        table.add_row(name, *map(_text, row, headings[1:]))
    console().print(table)
    say(note)


def _text(value: float | None, heading: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if heading.startswith("D of") else f"{value:.2%}"
