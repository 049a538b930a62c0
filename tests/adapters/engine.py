"""verl's FSDP2 engine with our loss on one fixed batch, without Ray: ``python engine.py RANK WORLD PORT FOLDER...``.

Each FOLDER holds a config.yaml; they are worked off one after the other in one process.

The learning rate is 0, so that every update starts from the same weights. One JSON line per update; what the updates
are to be compared with - the full distributions - goes to FOLDER/truth, verl's checkpoint to FOLDER/checkpoints.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

DELTA, DELTA_B, W_MIN = 0.105, 0.085, 0.8
RESPONSES = 16


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def fixed_rows(model_path, k):
    """16 responses of 1-40 tokens of random ids; mu is the model's own distribution with noise on every logit."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    lengths = [1, 2, 40, *torch.randint(5, 40, (RESPONSES - 3,), generator=generator).tolist()]
    rows = []
    for index, length in enumerate(lengths):
        prompt = torch.randint(7, 50, (6,), generator=generator)
        response = torch.randint(7, 50, (length,), generator=generator)
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        full_log_mu = (logits + 0.4 * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
        topk = full_log_mu.topk(k, dim=-1)
        rows.append(
            {
                "prompts": prompt,
                "responses": response,
                "input_ids": torch.cat([prompt, response]),
                "position_ids": torch.arange(len(prompt) + length),
                "response_mask": torch.ones_like(response),
                "loss_mask": torch.full((length,), int(index != 4)),  # response 4 belongs to a skipped group
                "rollout_log_probs": full_log_mu.gather(-1, response[:, None])[:, 0],
                "advantages": torch.randn((), generator=generator).repeat(length),
                "topk_ids": topk.indices.int(),
                "rollout_topk_log_prob": topk.values,
                "truth": {"log_pi": logits.double().log_softmax(-1), "log_mu": full_log_mu.double()},
            }
        )
    return rows


def batch_of(rows, seeds):
    columns = {name: nested([row[name] for row in rows]) for name in rows[0] if name != "truth"}
    batch = TensorDict(columns, batch_size=len(rows))
    batch["response_seeds"] = seeds.unsqueeze(-1)
    return batch


def update(worker, batch, micro_batch_size, dump_dir="", dynamic=False, all_rows=False, temperature=1.0):
    from verl.utils import tensordict_utils as tu

    batch = batch.clone()
    tu.assign_non_tensor(
        batch,
        temperature=temperature,
        calculate_entropy=True,
        global_batch_size=RESPONSES,
        mini_batch_size=RESPONSES,
        epochs=1,
        micro_batch_size_per_gpu=micro_batch_size,
        use_dynamic_bsz=dynamic,
        max_token_len_per_gpu=100 if dynamic else 4096,
        dump_dir=dump_dir,
        train_all_rows=all_rows or bool(dump_dir),  # as the trainer asks for in a dumped step
    )
    return tu.get(worker.train_mini_batch(batch), "metrics")


def updates(folder, rank, world):
    """Every size of micro-batch, each from the same weights."""
    from cppo_verl.adapters.actor.alone import actor_of

    config = OmegaConf.load(folder / "config.yaml")
    worker = actor_of(config)
    rows = fixed_rows(config.actor_rollout_ref.model.path, config.divergence.k or 20)
    torch.save(rows, folder / "truth")
    share = slice(rank, None, world)
    batch = batch_of(rows[share], torch.arange(RESPONSES)[share])
    sizes = {1: "", 4: "", len(batch): f"{folder}/dump"}
    for temperature in OmegaConf.to_object(config.get("temperatures", OmegaConf.create([]))):
        exactness(worker, batch, temperature, folder / f"exactness.{rank}")
    with open(folder / f"updates.{rank}", "w") as file:
        for size, dump in [*sizes.items(), ("dynamic", f"{folder}/dump-dynamic")]:
            dynamic = size == "dynamic"
            metrics = update(worker, batch, None if dynamic else size, dump, dynamic)
            plain = {name: torch.tensor(value).double().mean().item() for name, value in metrics.items()}
            file.write(json.dumps({"micro_batch_size": size, **plain}) + "\n")
        for left_out in OmegaConf.to_object(config.get("left_out", OmegaConf.create([]))):
            for size in (4, "dynamic"):
                for all_rows in (True, False):
                    rest = without_signal(batch, rows[share], left_out)
                    size_or_none, dynamic = (None, True) if size == "dynamic" else (size, False)
                    seconds = time.perf_counter()
                    metrics = update(worker, rest, size_or_none, dynamic=dynamic, all_rows=all_rows)
                    seconds = time.perf_counter() - seconds
                    plain = {name: torch.tensor(value).double().mean().item() for name, value in metrics.items()}
                    line = {"left_out": left_out, "micro_batch_size": size, "all_rows": all_rows, "seconds": seconds}
                    file.write(json.dumps({**line, **plain}) + "\n")
    worker.save_checkpoint(f"{folder}/checkpoints/global_step_4/actor")


def exactness(worker, batch, temperature, path):
    """Largest errors against float64 on the very logits of an update and of an evaluation, ours and verl's own.

    One line for each micro-batch ("dtype" is the logits'); of float32 logits one more with the norm of the gradient by
    verl's and by ours.
    """
    from types import SimpleNamespace

    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    ours, verls, lines = worker.engine.prepare_model_outputs, FSDPEngineWithLMHead.prepare_model_outputs, []

    def compared(output, output_args, micro_batch, logits_processor_func):
        logits = output.logits.detach().clone()
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        packed = "temperature_rmpad" in output_args
        rows = logits[0] if packed else torch.cat([row[:n] for row, n in zip(logits, lengths, strict=True)])
        log_pi = (rows.double() / temperature).log_softmax(-1)
        labels = output_args["input_ids_rmpad_rolled"]
        exact = {"log_probs": log_pi.gather(-1, labels[:, None])[:, 0], "entropy": -(log_pi.exp() * log_pi).sum(-1)}
        with torch.no_grad():
            theirs = verls(worker.engine, SimpleNamespace(logits=logits), output_args, micro_batch, lambda **_: {})
        result = ours(output, output_args, micro_batch, logits_processor_func)
        line = {"temperature": temperature, "dtype": str(logits.dtype), "training": torch.is_grad_enabled()}
        for name, found in (("ours", result), ("verls", theirs)):
            for key in exact:
                line[f"{name} {key}"] = (found[key].detach().values().double() - exact[key]).abs().max().item()
        lines.append(line)
        return result

    worker.engine.prepare_model_outputs = compared
    update(worker, batch, 4, temperature=temperature)
    evaluated = batch.clone()
    sizes = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}
    tu.assign_non_tensor(evaluated, temperature=temperature, calculate_entropy=True, compute_loss=False, **sizes)
    worker.infer_batch(evaluated)
    worker.engine.prepare_model_outputs = ours
    if lines[0]["dtype"] == "torch.float32":  # the loss refuses others from verl's
        gradients = []
        for prepare in (verls.__get__(worker.engine), ours):
            worker.engine.prepare_model_outputs = prepare
            gradients.append(torch.tensor(update(worker, batch, 4, temperature=temperature)["grad_norm"]).mean().item())
        lines.append({"temperature": temperature, "gradients": gradients})
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def without_signal(batch, rows, left_out):
    """The batch with the loss mask of this rank's rows cleared from ``left_out[0]`` to ``left_out[1]``."""
    first, last = left_out
    masks = [
        torch.zeros_like(row["loss_mask"]) if first <= place < last else row["loss_mask"]
        for place, row in enumerate(rows)
    ]
    batch = batch.clone()
    batch["loss_mask"] = nested(masks)
    return batch


def run_engine(configs, folder, world, platform="cpu"):
    """By name: folder, and each rank's updates by micro-batch size. All in one start of ``world`` processes."""
    for name, config in configs.items():
        (folder / name).mkdir()
        OmegaConf.save(config, folder / name / "config.yaml", resolve=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"VERL_PLATFORM": "cpu"} if platform == "cpu" else {})
    folders = {name: folder / name for name in configs}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(port), *map(str, folders.values())],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]

    def read(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    return {name: (path, [read(path / f"updates.{rank}") for rank in range(world)]) for name, path in folders.items()}


def main(rank, world, port, *folders):
    os.environ |= {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    for folder in folders:
        updates(Path(folder), int(rank), int(world))


if __name__ == "__main__":
    main(*sys.argv[1:])
