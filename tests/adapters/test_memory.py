"""The memory estimate against what verl's FSDP2 engine allocates on CPU, and parameter counts against transformers.

``python test_memory.py CASES OUT RANK WORLD PORT`` is the measuring process.
"""

import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cppo_verl.config.compose import compose, config_dir
from cppo_verl.dry_run.memory import checkpoint_bytes, estimate, key_value_bytes, vllm_weights
from cppo_verl.dry_run.model import Model

PACKED = "actor_rollout_ref.model.use_remove_padding=true"
CHECKPOINTED = "actor_rollout_ref.model.enable_gradient_checkpointing=true"
HALF = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"
ENTROPY = "actor_rollout_ref.actor.calculate_entropy=true"

# name: (vocabulary, responses of a micro-batch, tokens of the longest, overrides)
CASES = {
    "128 tokens": (0, 2, 64, []),
    "512 tokens": (0, 4, 128, []),
    "2048 tokens": (0, 8, 256, []),
    "checkpointed, 128 tokens": (0, 2, 64, [CHECKPOINTED]),
    "checkpointed, 512 tokens": (0, 4, 128, [CHECKPOINTED]),
    "packed, 512 tokens": (0, 2, 256, [PACKED]),
    "packed, dynamic, 512 tokens": (0, 4, 128, [PACKED, "dynamic=512"]),
    "bfloat16, 512 tokens": (0, 4, 128, [HALF]),
    "bfloat16, checkpointed, 512 tokens": (0, 4, 128, [HALF, CHECKPOINTED]),
    "8000 ids, 64 tokens": (8000, 2, 32, []),
    "8000 ids, 256 tokens": (8000, 4, 64, []),
    "8000 ids, packed, 256 tokens": (8000, 4, 64, [PACKED]),
    "8000 ids, packed, checkpointed, 256 tokens": (8000, 4, 64, [PACKED, CHECKPOINTED]),
    "8000 ids, packed, entropy, 128 tokens": (8000, 4, 32, [PACKED, ENTROPY]),
    "2000 ids, packed, bfloat16, 128 tokens": (2000, 4, 32, [PACKED, HALF]),
}
SAVED = "8000 ids, 64 tokens"
TWO_RANKS = {"two ranks, 2000 ids, 256 tokens": (2000, 4, 64, [CHECKPOINTED])}


def configured(case, folder, world):
    """The case's configuration: two micro-batches to a rank, so that gradients are there when the second one peaks."""
    _, responses, longest, overrides = case
    budget = next((word.partition("=")[2] for word in overrides if word.startswith("dynamic=")), None)
    sizes = [f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={responses}"]
    if budget:
        sizes = ["actor_rollout_ref.actor.use_dynamic_bsz=true"]
        sizes.append(f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={budget}")
    return compose(
        [
            "platform=cpu",
            "recipe=quickstart",
            "run.name=memory",
            f"actor_rollout_ref.model.path={folder}",
            "actor_rollout_ref.actor.calculate_entropy=false",
            "data.max_prompt_length=8",
            f"data.max_response_length={longest - 8}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={world * responses}",
            "actor_rollout_ref.rollout.n=2",
            f"trainer.n_gpus_per_node={world}",
            *sizes,
            *[word for word in overrides if not word.startswith("dynamic=")],
        ]
    )


def model_folder(root, vocabulary):
    from cppo_verl.quickstart.model import build_model, build_tokenizer
    from cppo_verl.quickstart.specs import ModelShape

    folder = root / f"model-{vocabulary}"
    shape = ModelShape(vocabulary=vocabulary, max_positions=4096)
    tokenizer = build_tokenizer(shape)
    tokenizer.save_pretrained(folder)
    build_model(shape, tokenizer, seed=0).save_pretrained(folder)
    return folder


def batch_of(responses, longest, k):
    """Responses of the greatest length, but for a shorter one in each micro-batch: there is padding to mask."""
    import engine
    from tensordict import TensorDict

    rows = []
    for number in range(2 * responses):
        length = longest - 8 - (4 if number % responses == 0 else 0)
        ids = torch.arange(7, 7 + 8 + length) % 40 + 7
        # The sampled token is the most likely of K: what TopKLogits asks of a row.
        others = (ids[8:, None] + torch.arange(k)) % 50
        log_probs = torch.full((length, k), -5.0)
        log_probs[:, 0] = -4.0
        ones = torch.ones(length)
        row = {"prompts": ids[:8], "responses": ids[8:], "input_ids": ids, "position_ids": torch.arange(len(ids))}
        row |= {"response_mask": ones.long(), "loss_mask": ones.long(), "advantages": ones}
        row |= {"rollout_log_probs": -4 * ones, "topk_ids": others.int(), "rollout_topk_log_prob": log_probs}
        rows.append(row)
    batch = TensorDict({name: engine.nested([row[name] for row in rows]) for name in rows[0]}, batch_size=len(rows))
    batch["response_seeds"] = torch.arange(len(rows)).unsqueeze(-1)
    return batch


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live: the highest sum is ``peak``."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: None for tensor in known}  # not counted
        self.total = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented  # its operations on local tensors follow
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    weakref.finalize(storage, self._set, storage._cdata, None)
                    self._set(storage._cdata, storage.nbytes())
        return result

    def _set(self, storage, size):
        self.total += (size or 0) - (self.sizes.pop(storage, None) or 0)
        self.peak = max(self.peak, self.total)
        if size is not None:
            self.sizes[storage] = size

    def __enter__(self):
        original = self.original = torch.UntypedStorage.resize_

        def resize_(storage, size):  # how FSDP frees gathered weights
            original(storage, size)
            if self.sizes.get(storage._cdata) is not None:
                self._set(storage._cdata, storage.nbytes())

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *arguments):
        torch.UntypedStorage.resize_ = self.original
        return super().__exit__(*arguments)


def measure(config, responses, longest, world, saved=None):
    """Bytes of weights, gradients and optimizer, and what one update allocates beyond them at its peak.

    ``saved``: a folder for verl's checkpoint, whose size is then measured too.
    """
    from verl.utils import tensordict_utils as tu

    from cppo_verl.adapters.actor.alone import actor_of

    actor = config.actor_rollout_ref.actor
    worker = actor_of(config)
    batch = batch_of(responses, longest, config.divergence.k)

    def update():
        data = batch.clone()
        settings = {"global_batch_size": len(batch) * world, "mini_batch_size": len(batch) * world, "epochs": 1}
        settings |= {"micro_batch_size_per_gpu": responses, "use_dynamic_bsz": actor.use_dynamic_bsz}
        settings |= {"max_token_len_per_gpu": actor.ppo_max_token_len_per_gpu, "dump_dir": "", "temperature": 1.0}
        tu.assign_non_tensor(data, calculate_entropy=actor.calculate_entropy, **settings)
        worker.train_mini_batch(data)

    update()  # makes the optimizer's states
    model, optimizer, step = worker.engine.module, worker.engine.optimizer, worker.engine.optimizer_step
    found = {"weights": size(model.parameters())}
    states = [value for state in optimizer.state.values() for value in state.values()]
    found["optimizer"] = size(states)

    def counted_step():
        found["gradients"] = size(parameter.grad for parameter in model.parameters())
        return step()

    worker.engine.optimizer_step = counted_step
    with Allocated(local([*model.parameters(), *states])) as allocated:
        update()
    found["activations"] = allocated.peak - found["gradients"]
    if saved:
        worker.save_checkpoint(str(saved))
        found["checkpoint"] = sum(file.stat().st_size for file in Path(saved).glob("*.pt"))
    return found


def local(tensors):
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in local(tensors))


def main(cases, out, rank, world, port):
    os.environ |= {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with open(f"{out}.{rank}", "w") as file:
        for name, (case, folder) in json.loads(cases).items():
            config = configured(case, folder, int(world))
            saved = f"{out}-checkpoint" if name == SAVED else None
            file.write(json.dumps({"case": name, **measure(config, *case[1:3], int(world), saved)}) + "\n")


def run(cases, root, world):
    folders = {vocabulary: model_folder(root, vocabulary) for vocabulary in {case[0] for case in cases.values()}}
    text = json.dumps({name: (case, str(folders[case[0]])) for name, case in cases.items()})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = root / f"measured-{world}"
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, text, str(out)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    lines = Path(f"{out}.0").read_text().splitlines()
    return {line["case"]: (line, folders[cases[line["case"]][0]]) for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run(CASES, tmp_path_factory.mktemp("memory"), 1)


def assert_agrees(name, case, found, folder, world):
    config = configured(case, folder, world)
    facts = Model.from_config(json.loads((folder / "config.json").read_text()))
    parts = estimate(config, facts, card=None).update
    expected = {
        "weights": parts.weights,
        "gradients": parts.gradients,
        "optimizer": parts.optimizer,
        "activations": parts.activations + parts.logits + parts.gathered,
    }
    print(name, "  ".join(f"{part} {expected[part]:.0f} / {found[part]}" for part in expected))
    for part in ("weights", "gradients", "optimizer"):
        assert expected[part] == pytest.approx(found[part], rel=0.05), part
    # Where they are large beside the weights, those gathered meanwhile hardly count: one saved tensor too many shows.
    close = 0.04 if found["activations"] > 8 * found["weights"] else 0.10
    assert expected["activations"] == pytest.approx(found["activations"], rel=close)
    if "checkpoint" in found:
        assert checkpoint_bytes(config, facts) == pytest.approx(found["checkpoint"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_the_engine_allocates(measured, name):
    assert_agrees(name, CASES[name], *measured[name], world=1)


@pytest.mark.slow
def test_two_ranks_hold_half_of_the_states(tmp_path):
    for name, (found, folder) in run(TWO_RANKS, tmp_path, 2).items():
        assert_agrees(name, TWO_RANKS[name], found, folder, world=2)


def test_the_chunk_is_the_actors():
    from cppo_verl.adapters.actor.log_prob import CHUNK
    from cppo_verl.dry_run.memory import LOG_PROB_CHUNK

    assert LOG_PROB_CHUNK == CHUNK


def facts(name):
    return json.loads((config_dir() / "facts" / f"{name}.json").read_text())


def counted(settings):
    """Parameters of transformers' model, built without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    return sum(parameter.numel() for parameter in model.parameters())


SHAPES = {
    # Totals of the published weights; active ones as the model card rounds them.
    "Qwen3-1.7B": (1_720_574_976, 1.72e9),
    "Qwen3-8B": (8_190_735_360, 8.19e9),
    "Qwen3-30B-A3B": (30_532_122_624, 3.35e9),
}
OTHERS = [
    {"model_type": "qwen2", "hidden_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": False},
    {"model_type": "llama", "hidden_size": 64, "num_key_value_heads": 4, "tie_word_embeddings": True},
]


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_the_published_ones(name):
    total, active = SHAPES[name]
    model = Model.from_config(facts(name))
    assert model.parameters == total == counted(facts(name))
    assert model.active_parameters == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize("settings", OTHERS, ids=lambda settings: settings["model_type"])
def test_parameters_of_other_architectures(settings):
    settings = {
        **settings,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    assert Model.from_config(settings).parameters == counted(settings)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"attention_bias": True},
        {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [0]},
    ],
)
def test_what_is_not_counted_exactly_is_not_counted(change):
    assert Model.from_config({**facts("Qwen3-8B"), **change}) is None


def test_states_of_the_8b_run():
    """FSDP2 over 8 GPUs, float32: 4 + 4 + 8 bytes a parameter, of which weights and Adam stay while vLLM generates."""
    model, card = Model.from_config(facts("Qwen3-8B")), 80 * 2**30
    config = compose(["platform=gpu", "recipe=qwen3_8b_base"])
    found = estimate(config, model, card)
    share = 8_190_735_360 * 4 / 8
    assert (found.update.weights, found.update.gradients, found.update.optimizer) == (share, share, 2 * share)
    assert (found.rollout.weights, found.rollout.gradients, found.rollout.optimizer) == (share, 0, 2 * share)
    assert found.rollout.vllm == 0.7 * card
    assert found.sync.vllm == vllm_weights(config, model) == 2 * 8_190_735_360
    # bfloat16 logits of 16,384 tokens; a layer's input kept for each of 36 layers.
    assert found.update.logits == 16384 * 151936 * 2
    assert found.update.activations == pytest.approx(36 * 16384 * 4096 * 2, rel=0.15)
    assert key_value_bytes(config, model) == 2 * 2 * 36 * 8 * 128
    offloaded = "actor_rollout_ref.actor.fsdp_config"
    config = compose(["platform=gpu", "recipe=qwen3_8b_base", f"{offloaded}.optimizer_offload=true"])
    assert estimate(config, model, card).rollout.total == share + 0.7 * card
    assert estimate(config, model, card).update == found.update  # verl loads it for the update


def test_states_of_the_30b_run():
    """Megatron, TP 4, EP 8, ETP 1 on 32 GPUs: dense weights over 4, experts over 8; Adam over 8 and 4 ranks more."""
    config = compose(["platform=gpu", "recipe=qwen3_30b_a3b_base"])
    attention = 2048 * (4096 + 2 * 512) + 4096 * 2048
    replicated = 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048
    dense = (48 * attention + 2 * 151936 * 2048) / 4 + replicated
    experts = 48 * 128 * 3 * 2048 * 768 / 8
    found = estimate(config, Model.from_config(facts("Qwen3-30B-A3B")), 80 * 2**30)
    assert found.update.weights == pytest.approx(2 * (dense + experts))
    assert found.update.gradients == pytest.approx(4 * (dense + experts))
    assert found.update.optimizer == pytest.approx(12 * (dense / 8 + experts / 4))
    assert found.update.logits == pytest.approx(32768 * 151936 / 4 * (2 + 4))
    assert found.rollout.total == 0.7 * 80 * 2**30  # everything else is offloaded
    assert found.sync.weights == found.update.weights


QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
QWEN3_32B = {
    **facts("Qwen3-8B"),
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 25600,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def public_update(settings, nodes, gpus, budget, **parallelism):
    """The update's parts in the recipe with full recomputation (Megatron) or checkpointing (FSDP2)."""
    recipe = "qwen3_30b_a3b_base" if parallelism else "qwen3_8b_base"
    overrides = [f"actor_rollout_ref.actor.megatron.{name}={value}" for name, value in parallelism.items()]
    overrides += [f"trainer.nnodes={nodes}", f"trainer.n_gpus_per_node={gpus}"]
    overrides += [f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={budget}"]
    config = compose(["platform=gpu", f"recipe={recipe}", *overrides])
    return estimate(config, Model.from_config(settings), 80 * 2**30).update


# What ms-swift's example scripts note of a card, in GiB: full fine-tuning with Megatron, layers recomputed, packed.
READINGS = {
    "Qwen3-30B-A3B, 16 GPUs, TP 2, EP 8, 8192 tokens": (
        60,
        (facts("Qwen3-30B-A3B"), 2, 8, 8192),
        {"tensor_model_parallel_size": 2},
    ),
    "Qwen3-32B, 8 GPUs, TP 8, 8192 tokens": (80, (QWEN3_32B, 1, 8, 8192), {"tensor_model_parallel_size": 8}),
    "Qwen2.5-7B, 4 GPUs, TP 4, 32768 tokens": (50, (QWEN25_7B, 1, 4, 32768), {"tensor_model_parallel_size": 4}),
}


@pytest.mark.parametrize("name", READINGS)
def test_public_readings_are_above_the_estimate_but_not_far(name):
    """A card also holds contexts, communication buffers and what the allocator keeps."""
    reading, run_of, parallelism = READINGS[name]
    total = public_update(*run_of, **parallelism).total / 2**30
    print(f"{name}: {total:.1f} GiB of {reading}")
    assert 0.75 * reading < total < reading


def test_public_numbers_of_the_states():
    """verl's own log of 3.564 GiB after FSDP took Qwen2.5-7B over 8 GPUs; torchtitan's 15.0 GiB that 128 GPUs save
    against 8 for Llama 3.1 8B, which is 15/16 of an eighth of weights, gradients and Adam."""
    weights = public_update(QWEN25_7B, 1, 8, 16384).weights / 2**30
    eight, many = (public_update(LLAMA_8B, nodes, 8, 16384) for nodes in (1, 16))
    saved = sum(getattr(eight, part) - getattr(many, part) for part in ("weights", "gradients", "optimizer")) / 2**30
    print(f"weights {weights:.3f} GiB, saved {saved:.2f} GiB")
    assert weights == pytest.approx(3.564, rel=0.01)
    assert saved == pytest.approx(15.0, rel=0.10)


if __name__ == "__main__":
    main(*sys.argv[1:])
