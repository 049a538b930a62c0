"""Our loss inside verl's real FSDP2 engine: micro-batching, data parallelism and packing change neither gradient nor
metrics, and D_t is that of the full distributions."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine import DELTA, DELTA_B, W_MIN
from mask_oracle import mask_of_response
from omegaconf import OmegaConf

from cppo_verl.checkpoint.export import hugging_face_folder
from cppo_verl.checkpoint.find import CheckpointError, find

ENGINE = Path(__file__).with_name("engine.py")


def run_engine(config, folder, world):
    """Each rank's updates, one dict per micro-batch size."""
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"updates-{world}"
    command = [sys.executable, str(ENGINE), str(folder / "config.yaml"), str(out)]
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [[json.loads(line) for line in Path(f"{out}.{rank}").read_text().splitlines()] for rank in range(world)]


@pytest.fixture(scope="module")
def engine_config(live_assets):
    from cppo_verl.config.compose import compose

    return compose(
        [
            "platform=cpu",
            "recipe=quickstart",
            f"quickstart.assets={live_assets}",
            "run.name=engine",
            f"method.delta={DELTA}",
            f"method.delta_b={DELTA_B}",
            f"method.w_min={W_MIN}",
            "actor_rollout_ref.actor.optim.lr=0.0",
        ]
    )


@pytest.fixture(scope="module")
def linear(engine_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    return folder, run_engine(engine_config, folder, world=1)[0]


def test_the_batch_decides_every_token_clearly(linear):
    """No token within 1e-6 of a threshold, and both causes at work: otherwise the next tests would prove little."""
    folder, _ = linear
    dump = torch.load(next(folder.glob("updates-1.dump/*.pt")))
    rows = [mask_of_response(dump, row, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN) for row in range(16)]
    assert min(distance for _, margin, _ in rows for distance in margin) > 1e-6
    masked = [cause for keep, _, causes in rows for kept, cause in zip(keep, causes, strict=True) if not kept]
    assert min(masked.count("token"), masked.count("prefix")) >= 10
    gate = [(dump["gate"][row][dump["response_mask"][row]] == 1).tolist() for row in range(16)]
    assert gate == [keep for keep, _, _ in rows]


def assert_same_update(reference, other):
    assert other["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    scale = abs(reference["trust_region/absolute_loss"]) * reference["trust_region/tokens"] / (16 * 40)
    assert abs(other["loss"] - reference["loss"]) <= 1e-6 * scale
    for name in reference:
        if name.startswith(("trust_region/", "divergence/", "policy/", "rollout/")):
            assert other[name] == pytest.approx(reference[name], rel=1e-5, abs=1e-9), name


def test_micro_batch_size_changes_nothing(linear):
    _, updates = linear
    assert [update["micro_batch_size"] for update in updates] == [1, 4, 16, "dynamic"]
    for update in updates:
        assert_same_update(updates[2], update)


@pytest.fixture(scope="module")
def two_ranks(engine_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine2")
    config = engine_config.copy()
    config.trainer.n_gpus_per_node = 2
    return folder, run_engine(config, folder, world=2)


def test_two_ranks_train_like_one(linear, two_ranks):
    for updates in two_ranks[1]:
        for update in updates:
            assert_same_update(linear[1][2], update)


def test_merged_checkpoint_is_the_model(engine_config, linear, two_ranks):
    """Shards of one rank and of two become the model they were loaded from, in the merger's bfloat16."""
    from safetensors.torch import load_file

    original = load_file(f"{engine_config.actor_rollout_ref.model.path}/model.safetensors")
    for folder, world in ((linear[0], 1), (two_ranks[0], 2)):
        shards = folder / f"updates-{world}.checkpoints" / "global_step_4" / "actor"
        assert len(list(shards.glob("model_world_size_*"))) == world
        messages = []
        checkpoint = find(str(shards.parent))
        assert (checkpoint.step, checkpoint.backend, checkpoint.name) == (4, "fsdp", "step_4")
        merged = hugging_face_folder(checkpoint, messages.append)
        weights = load_file(merged / "model.safetensors")
        missing = original.keys() - weights.keys()
        assert missing <= {"lm_head.weight"}  # tied to the embedding
        assert all(torch.equal(weights[name], original[name].bfloat16()) for name in weights)
        assert hugging_face_folder(checkpoint, messages.append) == merged
        assert len(messages) == 1  # merged once
        assert (merged / "tokenizer_config.json").is_file()
    assert find(str(merged)).backend is None

    newest = next(shards.glob("model_world_size_*"))
    os.utime(newest, (time.time() + 5, time.time() + 5))  # saved again by a resumed run
    hugging_face_folder(checkpoint, messages.append)
    assert len(messages) == 2
    newest.unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        hugging_face_folder(checkpoint, messages.append)


def test_shuffled_weights_do_not_depend_on_micro_batches(engine_config, tmp_path):
    """Seeded per response; with one generator per micro-batch the three would differ."""
    config = engine_config.copy()
    config.method.weights = "shuffled"
    updates = run_engine(config, tmp_path, world=1)[0]
    for update in updates:
        assert_same_update(updates[2], update)


def true_divergence(name, row, k):
    """D_t of one response from the full float64 distributions: cells built explicitly, token by token."""
    log_pi, log_mu = row["truth"]["log_pi"], row["truth"]["log_mu"]
    result = []
    for t, sampled in enumerate(row["responses"].tolist()):
        pi, mu = log_pi[t].exp(), log_mu[t].exp()
        cells = {sampled}
        if name.startswith("topk"):
            cells |= set(mu.argsort(descending=True)[:k].tolist())
        cells = sorted(cells)
        rest = [index for index in range(len(pi)) if index not in cells]
        cell_pi, cell_mu = (torch.cat([p[cells], p[rest].sum()[None]]) for p in (pi, mu))
        if name.endswith("tv"):
            result.append(0.5 * (cell_pi - cell_mu).abs().sum())
        else:
            held = cell_mu > 0
            result.append((cell_mu[held] * (cell_mu[held] / cell_pi[held]).log()).sum())
    return torch.stack(result)


def largest_error(folder, world, name, k):
    """Of every dumped token's divergence, whatever rank, micro-batch or order it was computed in."""
    rows = torch.load(next(folder.glob("*.truth")))
    found, worst = 0, 0.0
    for path in folder.glob(f"updates-{world}.dump*/*.pt"):
        dump = torch.load(path)
        for response, valid, divergence in zip(
            dump["responses"], dump["response_mask"], dump["divergence"], strict=True
        ):
            if not valid.any():
                continue  # the skipped group
            (row,) = [
                row
                for row in rows
                if len(row["responses"]) == valid.sum() and torch.equal(row["responses"], response[: valid.sum()])
            ]
            found += len(row["responses"])
            error = (divergence[valid].double() - true_divergence(name, row, k)).abs().max()
            worst = max(worst, error.item())
    expected = sum(len(row["responses"]) for index, row in enumerate(rows) if index != 4)
    assert found == 2 * expected  # one dump of equal micro-batches, one of dynamic ones
    return worst


def test_divergence_is_that_of_the_full_distributions(linear):
    assert largest_error(linear[0], 1, "topk_tv", 20) < 1e-5


@pytest.mark.parametrize(
    ("name", "world", "packed"),
    [
        ("topk_kl", 1, False),
        ("binary_tv", 1, False),
        ("binary_kl", 1, False),
        ("topk_tv", 2, False),
        ("topk_tv", 1, True),
        ("topk_kl", 2, True),
    ],
)
def test_every_divergence_on_ranks_and_packed_sequences(engine_config, linear, tmp_path, name, world, packed):
    """Packed: verl's padding removal, with dynamic micro-batches, on transformers' sdpa attention."""
    from cppo_verl.config.compose import compose

    config = engine_config.copy()
    config.divergence = compose(["platform=cpu", f"divergence={name}"]).divergence
    config.actor_rollout_ref.model.use_remove_padding = packed
    config.trainer.n_gpus_per_node = world
    ranks = run_engine(config, tmp_path, world=world)
    assert largest_error(tmp_path, world, name, 20) < 1e-5
    if name == "topk_tv":
        for update in ranks[0]:
            assert_same_update(linear[1][2], update)


def test_the_mask_changes_the_gradient(engine_config, linear, tmp_path):
    """The same batch with delta = 1e9 and no budget: nothing masked, another gradient."""
    config = engine_config.copy()
    config.method.delta, config.method.delta_b = 1e9, None
    free = run_engine(config, tmp_path, world=1)[0][2]
    assert free["trust_region/masked"] == 0
    assert abs(free["grad_norm"] / linear[1][2]["grad_norm"] - 1) > 1e-2
