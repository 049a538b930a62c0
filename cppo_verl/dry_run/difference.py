"""What a configuration changes in verl's own."""

import json
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf


def difference(config: DictConfig, verl: DictConfig) -> Iterator[str]:
    """Every leaf with another value than in verl's own composition, then those that only follow from others.

    Top-level nodes that verl does not have are one line each; parts of verl that the run does not build are left out.
    """
    unused = _unused(config)
    ours, theirs = dict(_leaves(config)), dict(_leaves(verl))
    following, own, shown = [], dict[str, list[str]](), set()
    for key, (node, written, value) in ours.items():
        top, _, rest = key.partition(".")
        if key.startswith(unused):
            continue
        if top not in verl:
            if not key.endswith("_target_"):
                own.setdefault(top, []).append(f"{rest}={text_of(value)}")
        elif key in theirs:
            _, their_reference, their_value = theirs[key]
            line = f"{key}: {text_of(their_value)} -> {text_of(value)}"
            if value != their_value and written == their_reference:
                following.append(line)
            elif value != their_value:
                yield line
        elif node not in shown:  # a node that refers to another one is one line
            shown.add(node)
            yield f"{node}: {text_of(value if node == key else written)} (not a key of verl's)"
    for key, (_, _, value) in theirs.items():
        if key not in ours and not any(other.startswith(f"{key}.") for other in ours):
            yield f"{key}: {text_of(value)} -> absent"
    if following:
        yield "these follow by verl's own references"
        yield from (f"  {line}" for line in following)
    yield "nodes of cppo_verl's own"
    yield from (f"  {top}: {', '.join(settings)}" for top, settings in own.items())
    if unused:
        yield f"not listed, for this run does not build them: {', '.join(part.rstrip('.') for part in unused)}"


def _unused(config: DictConfig) -> tuple[str, ...]:
    """Prefixes of the keys of verl's parts that are off."""
    parts = {
        "critic.": config.critic.enable,
        "distillation.": config.distillation.enabled,
        "actor_rollout_ref.ref.": config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward,
    }
    return tuple(part for part, used in parts.items() if not used)


def _leaves(config: DictConfig) -> Iterator[tuple[str, tuple[str, Any, Any]]]:
    """(key, (where it is written, as written, resolved)): below a reference to a node, that is the reference."""

    def walk(key: str, node: str, written: Any, value: Any) -> Iterator[tuple[str, tuple[str, Any, Any]]]:
        if not isinstance(value, dict) or not value:
            yield key, (node, written, value)
            return
        for name in value:
            below = f"{key}.{name}" if key else str(name)
            if isinstance(written, dict):
                yield from walk(below, below, written[name], value[name])
            else:
                yield from walk(below, node, written, value[name])

    yield from walk("", "", OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True))


def text_of(value: Any) -> str:
    return value if isinstance(value, str) and value and value.isprintable() else json.dumps(value)
