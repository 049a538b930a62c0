"""A step's trajectories through a local TransferQueue, with and without the Top-K columns."""

import atexit
import functools
from collections.abc import Callable
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue.utils.serial_utils import encode
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK_COLUMNS, TOPK_IDS
from cppo_verl.bench.cells import Cell
from cppo_verl.config.compose import compose

_PARTITION = "bench"


def queue(cell: Cell) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Each response put by itself, as agent loops do, and the batch got at once; bytes as the queue encodes them."""
    _start()
    rows = [_trajectory(cell) for _ in range(cell["responses"])]
    bare = [{name: value for name, value in row.items() if name not in TOPK_COLUMNS} for row in rows]
    functions: dict[str, Callable[[], object]] = {}
    facts: dict[str, Any] = {"bytes": {}}
    for name, batch in (("top-k", rows), ("without", bare)):
        keys = [f"{name}-{cell['tokens']}-{cell['log_prob_dtype']}-{number}" for number in range(len(batch))]
        fields = [list_of_dict_to_tensordict([row]) for row in batch]
        functions[f"put {name}"] = functools.partial(_put, keys, fields)
        functions[f"get {name}"] = functools.partial(tq.kv_batch_get, keys=keys, partition_id=_PARTITION)
        facts["bytes"][name] = sum(len(memoryview(part).cast("B")) for field in fields for part in encode(field))
    return functions, facts


def _put(keys: list[str], fields: list[TensorDict]) -> None:
    for key, field in zip(keys, fields, strict=True):
        tq.kv_batch_put(keys=[key], partition_id=_PARTITION, fields=field, tags=[{}])


def _trajectory(cell: Cell) -> dict[str, Any]:
    """The columns of a response that a training step reads."""
    length, k = cell["tokens"], cell["k"]
    prompt, response = torch.randint(100_000, (256,)), torch.randint(100_000, (length,))
    return {
        "prompts": prompt,
        "responses": response,
        "input_ids": torch.cat([prompt, response]),
        "position_ids": torch.arange(256 + length),
        "response_mask": torch.ones(length, dtype=torch.int64),
        "loss_mask": torch.ones(length, dtype=torch.int64),
        "rollout_log_probs": torch.randn(length),
        TOPK_IDS: torch.randint(100_000, (length, k), dtype=torch.int32),
        ROLLOUT_TOPK_LOG_PROB: torch.randn(length, k).to(getattr(torch, cell["log_prob_dtype"])),
    }


@functools.cache
def _start() -> None:
    """TransferQueue as configs/platform/cpu.yaml sets it up, in a Ray of its own, until this process ends."""
    ray.init("local", num_cpus=8, num_gpus=0, include_dashboard=False, log_to_driver=False)
    config = compose(["platform=cpu"]).transfer_queue
    OmegaConf.update(config, "enable", True, force_add=True)
    tq.init(config)
    atexit.register(ray.shutdown)
    atexit.register(tq.close)
