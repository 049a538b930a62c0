"""One minibatch in verl's FSDP2 engine, without Ray, with our loss and with verl's; the statistics of a validation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo import metric_utils
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from cppo_verl.adapters.actor.alone import actor_of, join_process_group, settings_of
from cppo_verl.adapters.columns import TRAIN_ALL_ROWS
from cppo_verl.adapters.driver import resampling
from cppo_verl.bench.cells import Cell
from cppo_verl.bench.measure.tensors import peak
from cppo_verl.bench.model import random_model, tiny_model
from cppo_verl.config.compose import compose
from cppo_verl.run.machine import has_gpu

_PROMPT_TOKENS = 16
# With padding removal, and attention that needs no flash-attn.
_GPU = [
    "platform=gpu",
    "actor_rollout_ref.model.enable_gradient_checkpointing=true",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
]


def update(cell: Cell) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Forward, loss, backward and optimiser step of one minibatch: ours over the Top-K divergence, and stock GRPO.

    "bytes", on a GPU: what is taken at the peak beyond what stays.
    """
    batch, workers = _minibatch(cell), _workers(cell)
    _set_sizes(batch, micro_batch_size=int(cell.get("micro_batch") or cell["responses"]))
    functions: dict[str, Callable[[], object]] = {}
    for name, worker in workers.items():
        functions[name] = partial(_train, worker, batch)
    facts: dict[str, Any] = {}
    if has_gpu():
        for function in functions.values():
            function()  # the first makes the optimizer's state
        facts["bytes"] = {name: peak(function) for name, function in functions.items()}
    return functions, facts


def signal(cell: Cell) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """The same in four micro-batches, of which a share of the responses has no token in the loss.

    "all rows" is ours with ``run.train_all_rows``.
    """
    batch, workers = _without_signal(_minibatch(cell), cell["share"]), _workers(cell)
    _set_sizes(batch, micro_batch_size=cell["responses"] // 4)
    whole = batch.clone()
    tu.assign_non_tensor(whole, **{TRAIN_ALL_ROWS: True})
    functions = {name: partial(_train, worker, batch) for name, worker in workers.items()}
    return {**functions, "all rows": partial(_train, workers["ours"], whole)}, {}


def _without_signal(batch: TensorDict, share: float) -> TensorDict:
    """The batch with the loss mask of its first responses cleared."""
    without = round(share * len(batch))
    mask = [row * (number >= without) for number, row in enumerate(batch["loss_mask"].unbind())]
    batch["loss_mask"] = torch.nested.as_nested_tensor(mask, layout=torch.jagged)
    return batch


def _workers(cell: Cell) -> dict[str, TrainingWorker]:
    """verl's engine with our loss, and with verl's; each has a model of its own."""
    join_process_group()
    model_folder = random_model(cell["shape"]) if "shape" in cell else tiny_model(cell["vocabulary"])
    overrides = ["recipe=quickstart", "run.name=bench", "actor_rollout_ref.actor.optim.lr=0.0"]
    overrides += [f"actor_rollout_ref.model.path={model_folder}", *(_GPU if has_gpu() else ["platform=cpu"])]
    config = compose(overrides)
    stock = TrainingWorker(settings_of(config))
    stock.reset()
    stock.set_loss_fn(partial(ppo_loss, config=omega_conf_to_dataclass(config.actor_rollout_ref.actor)))
    return {"ours": actor_of(config), "stock": stock}


def _set_sizes(batch: TensorDict, micro_batch_size: int) -> None:
    rows = len(batch)
    tu.assign_non_tensor(
        batch,
        temperature=1.0,
        calculate_entropy=False,
        global_batch_size=rows,
        mini_batch_size=rows,
        epochs=1,
        micro_batch_size_per_gpu=micro_batch_size,
        use_dynamic_bsz=False,
        max_token_len_per_gpu=sum(len(row) for row in batch["input_ids"].unbind()),
    )


def _train(worker: TrainingWorker, batch: TensorDict) -> None:
    worker.train_mini_batch(batch.clone())


def validation(cell: Cell) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """best@k and worst@k of a validation, resampled by ours and by verl's own function."""
    draw = torch.Generator().manual_seed(0)
    uids = [f"p{problem}" for problem in range(cell["problems"]) for _ in range(cell["samples"])]
    values = {name: torch.rand(len(uids), generator=draw).tolist() for name in ("acc", "score")}
    original = metric_utils.bootstrap_metric

    def statistics(ours: bool) -> None:
        if ours:
            resampling.install()
        try:
            metric_utils.process_validation_metrics(["set"] * len(uids), uids, values)
        finally:
            metric_utils.bootstrap_metric = original

    return {"ours": lambda: statistics(True), "verl": lambda: statistics(False)}, {}


def _minibatch(cell: Cell) -> TensorDict:
    """Random responses; mu's K log-probabilities are those of a flat distribution, which every model here is near."""
    torch.manual_seed(0)
    rows, length, k, vocabulary = cell["responses"], cell["tokens"], cell["k"], cell["vocabulary"]
    flat = -torch.log(torch.tensor(float(vocabulary)))
    columns: dict[str, list[torch.Tensor]] = {}
    for _ in range(rows):
        prompt, response = (torch.randint(vocabulary, (size,)) for size in (_PROMPT_TOKENS, length))
        fields = {
            "prompts": prompt,
            "responses": response,
            "input_ids": torch.cat([prompt, response]),
            "position_ids": torch.arange(_PROMPT_TOKENS + length),
            "response_mask": torch.ones(length, dtype=torch.int64),
            "loss_mask": torch.ones(length, dtype=torch.int64),
            "rollout_log_probs": flat.expand(length).clone(),
            "old_log_probs": flat.expand(length).clone(),
            "advantages": torch.randn(()).expand(length).clone(),
            "topk_ids": (torch.randint(vocabulary, (length, 1)) + torch.arange(k)).remainder(vocabulary).int(),
            "rollout_topk_log_prob": flat.expand(length, k).clone(),
        }
        for name, value in fields.items():
            columns.setdefault(name, []).append(value)
    nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
    return TensorDict(nested, batch_size=rows)
