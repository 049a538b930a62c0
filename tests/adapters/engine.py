"""verl's FSDP2 engine with our loss on one fixed batch, without Ray: ``python engine.py CONFIG OUT RANK WORLD PORT``.

The learning rate is 0, so that every update starts from the same weights. One JSON line per update.
"""

import json
import os
import sys

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

DELTA, DELTA_B, W_MIN = 0.006, 0.002, 0.8
RESPONSES = 16


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def fixed_batch(rank, world):
    """This rank's share of 16 responses of 1-40 tokens; rollout log-probabilities scattered around a random model's."""
    generator = torch.Generator().manual_seed(7)
    lengths = [1, 2, 40, *torch.randint(5, 40, (RESPONSES - 3,), generator=generator).tolist()]
    rows = []
    for index, length in enumerate(lengths):
        prompt = torch.randint(7, 50, (6,), generator=generator)
        response = torch.randint(7, 50, (length,), generator=generator)
        log_mu = -3.97 + 0.4 * torch.randn(length, generator=generator)
        advantage = torch.randn((), generator=generator).expand(length)
        valid = torch.full((length,), int(index != 4))  # response 4 belongs to a skipped group
        rows.append((prompt, response, log_mu, advantage, valid))
    rows = rows[rank::world]
    columns = {
        "prompts": [row[0] for row in rows],
        "responses": [row[1] for row in rows],
        "input_ids": [torch.cat(row[:2]) for row in rows],
        "position_ids": [torch.arange(len(row[0]) + len(row[1])) for row in rows],
        "response_mask": [torch.ones_like(row[1]) for row in rows],
        "loss_mask": [row[4] for row in rows],
        "rollout_log_probs": [row[2] for row in rows],
        "advantages": [row[3].clone() for row in rows],
    }
    batch = TensorDict({name: nested(column) for name, column in columns.items()}, batch_size=len(rows))
    batch["response_seeds"] = torch.arange(RESPONSES)[rank::world].unsqueeze(-1)
    return batch


def build_worker(config):
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine_workers import TrainingWorkerConfig

    from cppo_verl.adapters.actor import TrustRegionTrainingWorker
    from cppo_verl.adapters.loss import TrustRegionLoss

    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    worker = TrustRegionTrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=actor.engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
    )
    worker.reset()
    worker.set_loss_fn(TrustRegionLoss(actor))
    return worker


def update(worker, batch, micro_batch_size, dump_dir=""):
    from verl.utils import tensordict_utils as tu

    batch = batch.clone()
    tu.assign_non_tensor(
        batch,
        temperature=1.0,
        calculate_entropy=True,
        global_batch_size=RESPONSES,
        mini_batch_size=RESPONSES,
        epochs=1,
        micro_batch_size_per_gpu=micro_batch_size,
        use_dynamic_bsz=False,
        max_token_len_per_gpu=4096,
        dump_dir=dump_dir,
    )
    return tu.get(worker.train_mini_batch(batch), "metrics")


def main(config_file, out, rank, world, port):
    os.environ |= {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    config = OmegaConf.load(config_file)
    worker = build_worker(config)
    batch = fixed_batch(int(rank), int(world))
    with open(f"{out}.{rank}", "w") as file:
        for size in (1, 4, RESPONSES):
            if size > len(batch):
                size = len(batch)
            metrics = update(worker, batch, size, dump_dir=f"{out}.dump" if size == len(batch) else "")
            plain = {name: torch.tensor(value).double().mean().item() for name, value in metrics.items()}
            file.write(json.dumps({"micro_batch_size": size, **plain}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
