"""The responses of a dumped step, as columns over all their tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cppo_verl.problems import ConfigError
from cppo_verl.run.dumps import load

# A cell whose probability is below this under both policies is left to "other".
SMALLEST = 1e-3
UNIT = 65535  # of a probability in 16 bits

_FLOATS = ("log_prob", "rollout_log_prob", "divergence", "advantages", "gate")
_NEEDED = (*_FLOATS, "response_mask", "token_cause", "prompts", "responses")


class Step(NamedTuple):
    """What the page shows of one step; N tokens, of one response after the other, M Top-K cells."""

    number: int
    columns: dict[str, np.ndarray]
    """float32 ``[N]`` as dumped; ``valid``, ``token_cause`` uint8 ``[N]``; ``id`` int32 ``[N]``; ``cells`` uint8
    ``[N]``, how many of the cells ``cell_id`` int32, ``cell_pi``, ``cell_mu`` uint16 (in 1/65535) ``[M]`` are each
    token's; ``positions`` int32 ``[N]``, where weights are shuffled."""
    responses: list[dict[str, Any]]
    """``tokens``, ``prompt`` (a place in ``prompts``), ``minibatch``, ``right`` (None: not known) of each."""
    prompts: list[list[int]]
    """Token ids."""
    left_out: int
    """Responses of prompts that are not shown."""


def steps_of(run: Path) -> dict[int, list[Path]]:
    """Number of each dumped step -> its files, by minibatch, rank and micro-batch."""
    found: dict[int, list[Path]] = {}
    for folder in run.glob("dumps/step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdecimal() and (files := sorted(folder.glob("minibatch*.pt"), key=_place)):
            found[int(number)] = files
    return dict(sorted(found.items()))


def read_step(number: int, files: Sequence[Path], limit: int, shuffled: bool) -> Step:
    """All responses of a step's prompts; where they have over ``limit`` tokens, of every other, third ... prompt.

    Args:
        limit: tokens, kept to on the average: a prompt is shown with all its responses or not at all.
        shuffled: the method's weights are; each response's come from its dumped seed.

    Raises:
        ConfigError: a file is damaged or of another format, or no response has a token in the loss.
    """
    chosen, total = _prompts(files, limit)
    rows = []
    for file in files:
        dump, minibatch = _read(file), _place(file)[0]
        for index, key in _trained(dump):
            if key in chosen:
                rows.append((chosen[key], minibatch, _row(dump, index, shuffled)))
    rows.sort(key=lambda row: row[0])  # stable: a group's responses stay in the order of the files
    columns = {name: np.concatenate([row[name] for *_, row in rows]) for name in rows[0][2] if name != "right"}
    responses = [
        {"tokens": len(row["id"]), "prompt": prompt, "minibatch": minibatch, "right": row["right"]}
        for prompt, minibatch, row in rows
    ]
    return Step(number, columns, responses, [list(key) for key in chosen], total - len(rows))


def _prompts(files: Sequence[Path], limit: int) -> tuple[dict[tuple[int, ...], int], int]:
    """The prompts to show, token ids -> place, and how many responses the step has."""
    keys: dict[tuple[int, ...], None] = {}
    responses = tokens = 0
    for file in files:
        dump = _read(file)
        trained = _trained(dump)
        keys |= dict.fromkeys(key for _, key in trained)
        responses += len(trained)
        tokens += int(dump["response_mask"].sum())
    if not keys:
        raise ConfigError(f"{files[0].parent} has no token in the loss (all groups were skipped): give another --step")
    ordered = list(keys)
    number = min(max(len(ordered) * limit // tokens, 1), len(ordered))
    # Spread over the step: its first minibatch is trained by the weights that sampled it, and nothing in it has moved.
    chosen = [ordered[place * len(ordered) // number] for place in range(number)]
    return {key: place for place, key in enumerate(chosen)}, responses


def _read(file: Path) -> dict[str, Any]:
    dump = load(file)
    if lacking := [name for name in _NEEDED if name not in dump]:
        raise ConfigError(f"{file} lacks {', '.join(lacking)}: it is no dump of run.dump_steps; move it away")
    return dump


def _trained(dump: dict[str, Any]) -> list[tuple[int, tuple[int, ...]]]:
    """(row, prompt without padding) of the responses with a token in the loss."""
    prompts = dump["prompts"].tolist()
    keys = []
    for index in dump["response_mask"].any(-1).nonzero()[:, 0].tolist():
        ids = prompts[index]
        while ids and ids[-1] == 0:
            ids.pop()
        keys.append((index, tuple(ids)))
    return keys


def _row(dump: dict[str, Any], index: int, shuffled: bool) -> dict[str, Any]:
    """The columns of one response up to its last token in the loss."""
    valid = dump["response_mask"][index].bool()
    length = int(valid.nonzero()[-1]) + 1
    part = {name: dump[name][index, :length].float().numpy() for name in _FLOATS}
    row: dict[str, Any] = {**part, "valid": valid[:length].numpy().astype(np.uint8)}
    row["token_cause"] = dump["token_cause"][index, :length].numpy().astype(np.uint8)
    row["id"] = dump["responses"][index, :length].numpy().astype(np.int32)
    row |= _cells(dump, index, length)
    if shuffled:
        row["positions"] = _shuffled(valid[:length], int(dump["response_seeds"][index]))
    row["right"] = bool(dump["acc"][index] > 0.5) if "acc" in dump else _by_advantage(part["advantages"][0])
    return row


def _by_advantage(advantage: float) -> bool | None:
    """Of graded responses of one prompt the right ones are those above the mean."""
    return None if advantage == 0 else bool(advantage > 0)


def _shuffled(valid: torch.Tensor, seed: int) -> np.ndarray:
    """The positions that ``core.position_weights`` draws for this response."""
    positions = torch.zeros(len(valid), dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    positions[valid] = torch.randperm(int(valid.sum()), generator=generator).int()
    return positions.numpy()


def _cells(dump: dict[str, Any], index: int, length: int) -> dict[str, np.ndarray]:
    """The Top-K cells worth a bar, for display: probabilities in 16 bits."""
    if "topk_ids" not in dump:
        none = np.zeros(0, np.uint16)
        return {"cells": np.zeros(length, np.uint8), "cell_id": np.zeros(0, np.int32), "cell_pi": none, "cell_mu": none}
    pi, mu = (dump[name][index, :length].float().exp() for name in ("topk_log_prob", "rollout_topk_log_prob"))
    seen = (torch.maximum(pi, mu) >= SMALLEST) & dump["response_mask"][index, :length, None].bool()

    def share(probability: torch.Tensor) -> np.ndarray:
        return (UNIT * probability[seen]).round().clamp(0, UNIT).numpy().astype(np.uint16)

    ids = dump["topk_ids"][index, :length][seen].numpy().astype(np.int32)
    return {"cells": seen.sum(-1).numpy().astype(np.uint8), "cell_id": ids, "cell_pi": share(pi), "cell_mu": share(mu)}


def _place(file: Path) -> tuple[int, ...]:
    """minibatch1_rank0_micro2.pt -> (1, 0, 2)."""
    return tuple(int("".join(filter(str.isdecimal, part)) or 0) for part in file.stem.split("_"))
