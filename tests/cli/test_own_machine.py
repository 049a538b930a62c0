"""One's own model on one's own machine: what is lacking is named, sizes follow the model, a silent run says so."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from cppo_verl.adapters.driver.placement import require_room
from cppo_verl.cli import main
from cppo_verl.config.compose import compose
from cppo_verl.dry_run import room
from cppo_verl.training.reward_signal import causes, verdict, without_signal

GIB = 2**30
BUCKET = "update_weights_bucket_megabytes"


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus, gib)``: what this one is taken for, outside any cluster."""

    def be(gpus=0, gib=24):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(room, "has_gpu", lambda: gpus > 0)
        monkeypatch.setattr(room, "gpus", lambda: ["NVIDIA H100, 81559 MiB"] * gpus)
        monkeypatch.setattr(room, "memory", lambda: (gib * GIB, gib * GIB))

    return be


@pytest.fixture
def model(tmp_path):
    """``model(**shape)``: a folder with the config.json of a Llama of 135 million parameters, or of that shape."""

    def make(**shape):
        smollm2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        smollm2 |= {"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True, "model_type": "llama"}
        (tmp_path / "config.json").write_text(json.dumps(smollm2 | shape))
        return f"actor_rollout_ref.model.path={tmp_path}"

    return make


def lacking(*overrides):
    return [problem.text for problem in room.lacking(compose(overrides))]


def test_the_only_worker_of_a_cpu_engine_is_in_its_process():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    name = "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend"
    two = "actor_rollout_ref.rollout.tensor_model_parallel_size=2"

    def executor(*overrides):
        return OmegaConf.select(compose(["recipe=small", *overrides]), name)

    assert resolve_obj_by_qualname(executor("platform=cpu")).__name__ == "UniProcExecutor"
    assert executor("platform=cpu", two) == "mp"
    assert executor("platform=cpu", f"{name}=mp") == "mp"
    assert executor("platform=gpu") is None


def test_no_gpu(machine):
    machine(gpus=0)
    (text,) = lacking("recipe=paper")
    assert text.startswith("trainer.device=cuda: this machine has no NVIDIA GPU; join a cluster")
    assert "recipe=small platform=cpu" in text


def test_too_few_gpus(machine, monkeypatch):
    machine(gpus=8)
    assert lacking("recipe=paper", "platform=gpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    (text,) = lacking("recipe=paper", "platform=gpu")
    assert text == "trainer.n_gpus_per_node=8, but this machine has 2: trainer.n_gpus_per_node=2"


def test_more_nodes_than_this_one(machine, monkeypatch):
    machine(gpus=8)
    (text,) = lacking("recipe=paper", "platform=gpu", "trainer.nnodes=4")
    assert text.startswith("trainer.nnodes=4: this machine is one node; start Ray on all of them and set RAY_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert lacking("recipe=paper", "platform=gpu", "trainer.nnodes=4") == []
    own = "ray_kwargs.ray_init.address=local"
    assert len(lacking("recipe=paper", "platform=gpu", "trainer.nnodes=4", own)) == 1


def test_a_model_that_the_memory_does_not_hold(machine, model):
    machine(gib=24)
    assert lacking("recipe=small", "platform=cpu", model()) == []
    (text,) = lacking("recipe=small", "platform=cpu", model(hidden_size=4096, intermediate_size=12288))
    assert "takes about 1" in text
    assert "and this machine has 24; fewer tokens a micro-batch" in text
    machine(gib=4)
    (text,) = lacking("recipe=small", "platform=cpu", model())
    assert "and this machine has 4;" in text


def test_a_config_that_lacks_a_size_is_not_estimated(machine, model):
    machine(gib=24)
    assert lacking("recipe=small", "platform=cpu", model(num_attention_heads=None)) == []
    assert lacking("recipe=small", "platform=cpu", model(hidden_size="wide")) == []


def test_every_device_of_a_cpu_run_is_a_trainer_and_a_server(machine, model):
    machine(gib=24)
    (text,) = lacking("recipe=small", "platform=cpu", "trainer.n_gpus_per_node=8", model())
    assert "trainer.n_gpus_per_node=1 (each is a trainer and a vLLM server)" in text


def test_it_is_refused_by_the_command_and_only_said_by_a_dry_run(machine, model, live_assets, capsys):
    machine(gib=4)
    command = ["train", "platform=cpu", "recipe=quickstart", f"quickstart.assets={live_assets}", "trainer.nnodes=2"]
    assert main(command) == 2
    refused = capsys.readouterr().err.splitlines()
    assert [line.partition("=")[0] for line in refused[:1]] == ["cppo train: trainer.nnodes"]
    assert len(refused) == 2
    assert main([*command, "--dry-run"]) == 0
    assert "cppo train: not on this machine: trainer.nnodes=2" in capsys.readouterr().err


# Sizes.


def test_the_recipes_devices_do_not_stay_on_a_cpu():
    config = compose(["recipe=paper", "platform=cpu"])
    assert (config.trainer.n_gpus_per_node, config.actor_rollout_ref.model.use_remove_padding) == (1, False)
    assert compose(["recipe=paper", "platform=gpu"]).trainer.n_gpus_per_node == 8
    assert compose(["recipe=paper", "platform=cpu", "trainer.n_gpus_per_node=2"]).trainer.n_gpus_per_node == 2


@pytest.mark.parametrize(
    ("platform", "shape", "megabytes"),
    [
        ("cpu", {}, 108),  # 49,152 x 576 floats, of which 16 was too small
        ("cpu", {"vocab_size": 55}, 16),
        ("gpu", {}, 2048),
        ("gpu", {"vocab_size": 151936, "hidden_size": 5120}, 2968),
        (
            "gpu",
            {"vocab_size": 55, "num_experts": 128, "moe_intermediate_size": 1024, "hidden_size": 4096},
            4096,
        ),
        ("cpu", {"vocab_size": "many"}, 16),
    ],
)
def test_the_bucket_holds_the_largest_tensor(model, platform, shape, megabytes):
    config = compose(["recipe=small", f"platform={platform}", model(**shape)])
    assert config.actor_rollout_ref.rollout.checkpoint_engine[BUCKET] == megabytes


def test_a_bucket_of_ones_own_stays(model):
    key = f"actor_rollout_ref.rollout.checkpoint_engine.{BUCKET}"
    assert compose(["recipe=small", model(), f"{key}=64"]).actor_rollout_ref.rollout.checkpoint_engine[BUCKET] == 64


def test_lengths_that_the_model_does_not_have(model, live_assets, capsys):
    """verl's server would find it a minute after the start."""
    data = [f"data.{key}={live_assets}/train.parquet" for key in ("train_files", "val_files")]
    command = ["train", "recipe=small", "platform=cpu", *data, "--dry-run"]
    assert main([*command, model(max_position_embeddings=512)]) == 2
    assert "rollout.max_model_len=768 is more than the 512 positions of" in capsys.readouterr().err
    assert main([*command, model(max_position_embeddings=2048)]) == 0


# A cluster, when it is there.


def nodes(*resources):
    return [
        {"Alive": alive, "NodeManagerAddress": f"10.0.0.{number}", "Resources": {"GPU": gpus, "CPU": cpus}}
        for number, (gpus, cpus, alive) in enumerate(resources)
    ]


def wants(nnodes, devices, generating=0):
    mode = "separate_async" if generating else "sync"
    trainer = SimpleNamespace(nnodes=nnodes, n_gpus_per_node=devices, v1=SimpleNamespace(trainer_mode=mode))
    rollout = SimpleNamespace(nnodes=1, n_gpus_per_node=generating)
    return SimpleNamespace(trainer=trainer, actor_rollout_ref=SimpleNamespace(rollout=rollout))


def test_a_cluster_with_room():
    require_room(wants(2, 8), nodes((8, 96, True), (8, 96, True)))
    require_room(wants(1, 1), nodes((1, 4, True)))
    require_room(wants(1, 8, generating=8), nodes((8, 96, True), (8, 96, True)))


def test_a_cluster_without_room_for_servers_of_their_own():
    with pytest.raises(RuntimeError, match=r"asks for 8 GPUs to train and 8 to generate .* 10.0.0.0: 8 GPUs"):
        require_room(wants(1, 8, generating=8), nodes((8, 96, True)))


@pytest.mark.parametrize(
    "found",
    [
        nodes((8, 96, True)),
        nodes((8, 96, True), (8, 96, False)),
        nodes((8, 96, True), (4, 96, True)),
        nodes((8, 96, True), (8, 23, True)),
    ],
    ids=["one node", "a dead one", "too few GPUs", "too few slots"],
)
def test_a_cluster_without_room(found):
    with pytest.raises(RuntimeError, match=r"trainer.nnodes=2 asks for .* 8 GPUs .* 10.0.0.0: 8 GPUs, 96"):
        require_room(wants(2, 8), found)


def test_devices_that_take_every_slot():
    with pytest.raises(RuntimeError, match="take all CPU slots"):
        require_room(wants(1, 1), nodes((1, 3, True)))


# A run that cannot learn.

SILENT = {"groups/total": 8, "groups/zero_variance": 8, "grading/right": 0, "grading/wrong": 2, "grading/no_answer": 62}
SILENT |= {"grading/no_answer_rate": 0.97, "rollout/truncation_rate": 0.9}


def test_without_signal():
    assert without_signal(SILENT)
    assert not without_signal(SILENT | {"groups/zero_variance": 7})
    assert without_signal({"critic/advantages/max": 0.0, "critic/advantages/min": 0.0})
    assert not without_signal({"critic/advantages/max": 0.5, "critic/advantages/min": -0.5})
    assert not without_signal({})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (SILENT, ["90% of the responses were cut off: raise data.max_response_length", "97% gave no answer"]),
        ({"grading/right": 0, "grading/wrong": 64}, ["no response is right: easier problems"]),
        ({"grading/right": 64}, ["every response is right: harder problems"]),
        ({"grading/right": 32, "grading/wrong": 32}, ["more responses a problem"]),
        ({"grading/right": 0, "grading/error": 40, "grading/wrong": 24}, ["the grader failed on 62%"]),
    ],
)
def test_causes(line, said):
    parts = causes(line).split("; ")
    assert len(parts) == len(said)
    for part, words in zip(parts, said, strict=True):
        assert part.startswith(words)


def test_the_verdict_on_a_run():
    fine = {"groups/total": 8, "groups/zero_variance": 3}
    assert verdict([]) is None
    assert verdict([fine, fine, SILENT]) is None
    assert verdict([fine, SILENT]).startswith("1 of 2 steps had no group with right and wrong responses: 90% of")
