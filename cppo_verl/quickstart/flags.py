"""Command-line flags from the fields of dataclasses, and their values as plain nested data."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def add_flags(parser: argparse.ArgumentParser, specs: Mapping[str, Any], helps: Mapping[str, str]) -> None:
    """One flag for every field of every dataclass in ``specs``, its default the field's."""
    for name, spec in specs.items():
        group = parser.add_argument_group(name)
        for field in fields(spec):
            flag = f"--{flag_name(name, field.name)}"
            how: dict[str, Any] = {"action": "store_true"} if field.type is bool else {"type": type(field.default)}
            group.add_argument(flag, **how, default=field.default, help=helps[field.name])


def flag_name(group: str, field: str) -> str:
    """``--terms`` and the like; the fields of the warm-up carry its name, as in ``--warmup-steps``."""
    prefix = "warmup-" if group == "warmup" else ""
    return prefix + field.replace("_", "-")


def settings_from(arguments: argparse.Namespace, specs: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """The flags as plain nested data: what the manifest records and a later run is compared with.

    Args:
        others: flags that belong to no dataclass.
    """
    values = vars(arguments)
    settings: dict[str, Any] = {key: values[key] for key in others}
    for name, spec in specs.items():
        settings[name] = {f.name: values[flag_name(name, f.name).replace("-", "_")] for f in fields(spec)}
    return settings
