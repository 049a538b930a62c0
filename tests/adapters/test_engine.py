"""Our loss inside verl's real FSDP2 engine: micro-batching, data parallelism and packing change neither gradient nor
metrics, and D_t is that of the full distributions."""

import json
import os
import time

import pytest
import torch
from engine import DELTA, DELTA_B, W_MIN, run_engine
from mask_oracle import mask_of_response

from cppo_verl.checkpoint.export import hugging_face_folder
from cppo_verl.checkpoint.find import CheckpointError, find
from cppo_verl.config.compose import compose


@pytest.fixture(scope="module")
def engine_config(live_assets):
    """``engine_config(override, ...)``: the batch's configuration with further overrides."""

    def composed(*overrides):
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
                *overrides,
            ]
        )

    return composed


# verl's padding removal, with dynamic micro-batches, on transformers' sdpa attention.
PACKED = "actor_rollout_ref.model.use_remove_padding=true"
# bfloat16 logits, as a GPU's defaults make them.
HALF = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"
TEMPERATURES = "+temperatures=[1.0,0.7]"


@pytest.fixture(scope="module")
def one_rank(engine_config, tmp_path_factory):
    configs = {
        "topk_tv": engine_config(),
        "topk_kl": engine_config("divergence=topk_kl"),
        "binary_tv": engine_config("divergence=binary_tv"),
        "binary_kl": engine_config("divergence=binary_kl"),
        "topk_tv packed": engine_config(PACKED),
        "shuffled": engine_config("method.weights=shuffled"),
        "free": engine_config("method.delta=1e9", "method.delta_b=null"),
        "left out": engine_config("+left_out=[[0,0],[0,1],[3,9],[1,16],[0,16]]"),
        "exact": engine_config(TEMPERATURES),
        "exact bfloat16": engine_config(TEMPERATURES, HALF),
        "exact bfloat16 packed": engine_config(TEMPERATURES, HALF, PACKED),
    }
    return run_engine(configs, tmp_path_factory.mktemp("engine"), world=1)


@pytest.fixture(scope="module")
def two_ranks(engine_config, tmp_path_factory):
    cards = "trainer.n_gpus_per_node=2"
    configs = {
        "topk_tv": engine_config(cards),
        "topk_kl packed": engine_config(cards, "divergence=topk_kl", PACKED),
        # A rank's 8 rows: none, some, all of one rank's but one.
        "left out": engine_config(cards, "+left_out=[[0,0],[2,7],[1,8]]"),
    }
    return run_engine(configs, tmp_path_factory.mktemp("engine2"), world=2)


@pytest.fixture(scope="module")
def linear(one_rank):
    folder, ranks = one_rank["topk_tv"]
    return folder, ranks[0]


def test_the_batch_decides_every_token_clearly(linear):
    """No token within 1e-6 of a threshold, and both causes at work: otherwise the next tests would prove little."""
    folder, _ = linear
    dump = torch.load(next(folder.glob("dump/*.pt")))
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


def test_two_ranks_train_like_one(linear, two_ranks):
    for updates in two_ranks["topk_tv"][1]:
        for update in updates:
            assert_same_update(linear[1][2], update)


def test_merged_checkpoint_is_the_model(live_assets, linear, two_ranks):
    """Shards of one rank and of two become the model they were loaded from, in the merger's bfloat16."""
    from safetensors.torch import load_file

    original = load_file(live_assets / "model" / "model.safetensors")
    for folder, world in ((linear[0], 1), (two_ranks["topk_tv"][0], 2)):
        shards = folder / "checkpoints" / "global_step_4" / "actor"
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


def test_shuffled_weights_do_not_depend_on_micro_batches(one_rank, linear):
    """Seeded per response; with one generator per micro-batch the sizes would differ."""
    updates = one_rank["shuffled"][1][0]
    for update in updates:
        assert_same_update(updates[2], update)
    assert updates[2]["trust_region/masked"] != linear[1][2]["trust_region/masked"]


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


def largest_error(folder, name, k):
    """Of every dumped token's divergence, whatever rank, micro-batch or order it was computed in."""
    rows = torch.load(folder / "truth")
    found, worst = 0, 0.0
    for path in folder.glob("dump*/*.pt"):
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


@pytest.mark.parametrize(
    ("world", "name"),
    [
        *((1, name) for name in ("topk_tv", "topk_kl", "binary_tv", "binary_kl", "topk_tv packed")),
        *((2, name) for name in ("topk_tv", "topk_kl packed")),
    ],
)
def test_every_divergence_is_that_of_the_full_distributions(one_rank, two_ranks, linear, world, name):
    """On ranks and packed sequences alike."""
    folder, ranks = (one_rank if world == 1 else two_ranks)[name]
    assert largest_error(folder, name.split()[0], 20) < 1e-5
    if name.startswith("topk_tv"):
        for update in ranks[0]:
            assert_same_update(linear[1][2], update)


@pytest.mark.parametrize("name", ["exact", "exact bfloat16", "exact bfloat16 packed"])
def test_log_pi_and_entropy_are_float32_of_the_logits(one_rank, name):
    """In updates and evaluations, at temperature 1 and 0.7; verl's own are off on the same bfloat16 logits."""
    half = "bfloat16" in name
    lines = [json.loads(line) for line in (one_rank[name][0] / "exactness.0").read_text().splitlines()]
    errors = [line for line in lines if "dtype" in line]
    assert {(line["temperature"], line["training"]) for line in errors} == {
        (temperature, training) for temperature in (1.0, 0.7) for training in (True, False)
    }
    for line in errors:
        assert line["dtype"] == ("torch.bfloat16" if half else "torch.float32")
        for key in ("log_probs", "entropy"):
            assert line[f"ours {key}"] < 1e-5
            assert (line[f"verls {key}"] > 1e-3) == half
    gradients = [line["gradients"] for line in lines if "gradients" in line]
    assert len(gradients) == (0 if half else 2)
    for verls, ours in gradients:
        assert ours == pytest.approx(verls, rel=1e-5)
        assert ours > 0


def test_the_mask_changes_the_gradient(one_rank, linear):
    """The same batch with delta = 1e9 and no budget: nothing masked, another gradient."""
    free = one_rank["free"][1][0][2]
    assert free["trust_region/masked"] == 0
    assert abs(free["grad_norm"] / linear[1][2]["grad_norm"] - 1) > 1e-2


@pytest.mark.parametrize("world", [1, 2])
def test_rows_without_a_signal_are_left_out_and_change_nothing(one_rank, two_ranks, world):
    """Gradient, loss and metrics of the same minibatch with and without its skipped rows in the passes."""
    _, ranks = (one_rank if world == 1 else two_ranks)["left out"]
    lines = [line for line in ranks[0] if "left_out" in line]
    assert len(lines) == 4 * (5 if world == 1 else 3)
    assert not [line for line in lines[::2] if "update/trained_share" in line]
    for whole, part in zip(lines[::2], lines[1::2], strict=True):
        assert (whole["all_rows"], part["all_rows"]) == (True, False)
        if part["update/skipped_minibatches"]:
            assert part["left_out"] == [0, 16]
            assert whole["grad_norm"] == 0
            assert "grad_norm" not in part  # no step was taken
            continue
        assert part["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-4, abs=1e-7)
        for name in whole:
            if name.startswith(("trust_region/", "divergence/", "policy/", "rollout/")):
                assert part[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-9), name
    shares = [line["update/trained_share"] for line in lines[1::4]]
    # Response 4 has no signal in any case; on two ranks it is the third row of the first.
    assert shares == ([15 / 16, 14 / 16, 10 / 16, 1 / 16, 0] if world == 1 else [15 / 16, 6 / 16, 2 / 16])
