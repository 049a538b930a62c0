"""The command line of a preparation: flags from the fields of dataclasses, and their values as plain nested data."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

# Flags that belong to no dataclass, beside --out.
_OTHERS = ("seed", "measure_samples", "measure_max_tokens")


def parser_of(
    prog: str,
    description: str,
    specs: Mapping[str, Any],
    helps: Mapping[str, str],
    *,
    seed: str,
    samples: int,
    max_tokens: int,
) -> argparse.ArgumentParser:
    """One flag for every field of every dataclass in ``specs``, its default the field's, and those of all preparations.

    Args:
        seed: what the seed decides.
        samples, max_tokens: defaults of the measurement at the end.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to build")
    parser.add_argument("--seed", type=int, default=0, help=f"decides {seed}")
    measured = "samples per held-out problem, temperature 1"
    parser.add_argument("--measure-samples", type=int, default=samples, help=measured)
    parser.add_argument("--measure-max-tokens", type=int, default=max_tokens, help="longest sampled answer, in tokens")
    for name, spec in specs.items():
        group = parser.add_argument_group(name)
        for field in fields(spec):
            flag = f"--{flag_name(name, field.name)}"
            how: dict[str, Any] = {"action": "store_true"} if field.type is bool else {"type": type(field.default)}
            group.add_argument(flag, **how, default=field.default, help=helps[field.name])
    return parser


def flag_name(group: str, field: str) -> str:
    """``--terms`` and the like; the fields of the warm-up carry its name, as in ``--warmup-steps``."""
    prefix = "warmup-" if group == "warmup" else ""
    return prefix + field.replace("_", "-")


def wrong_number(settings: Mapping[str, Any], specs: Mapping[str, Any]) -> str | None:
    """The first flag whose number cannot be meant, and what to give. A 0 that is the default means something."""
    for group, spec in specs.items():
        meant = {field.name for field in fields(spec) if field.default == 0}
        for name, value in settings[group].items():
            share = name.endswith("_share")
            if value < 0 or (share and value > 1) or (value == 0 and not share and name not in meant):
                return f"--{flag_name(group, name)} {value}: give a number {'from 0 to 1' if share else 'above 0'}"
    return None


def settings_from(arguments: argparse.Namespace, specs: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as plain nested data: what the manifest records and a later run is compared with."""
    values = vars(arguments)
    settings: dict[str, Any] = {key: values[key] for key in _OTHERS}
    for name, spec in specs.items():
        settings[name] = {f.name: values[flag_name(name, f.name).replace("-", "_")] for f in fields(spec)}
    return settings


def summary(out: Path, manifest: Mapping[str, Any]) -> str:
    """What a finished preparation says of itself."""
    sampled, problems = manifest["heldout_sampled"], manifest["problems"]
    return (
        f"{out}: {manifest['parameters']:,} parameters, {problems['train']} training and {problems['heldout']} "
        f"held-out problems, sampled accuracy {sampled['accuracy']:.1%}, {sampled['boxed_share']:.1%} boxed, "
        f"{manifest['seconds']:.0f} s"
    )
