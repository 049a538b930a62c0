"""What a person may call a checkpoint, and what is refused."""

import pytest

from cppo_verl.checkpoint import retention
from cppo_verl.checkpoint.export import fingerprint
from cppo_verl.checkpoint.find import CheckpointError, checkpoints_of, find
from cppo_verl.cli import main
from cppo_verl.evaluation.request import run_config
from cppo_verl.evaluation.samples import EvaluationError


def hugging_face(folder, weights="w"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run folder: step 5 with verl's shards, steps 10 and 20 with a whole Hugging Face model; 10 is the latest."""
    folder = tmp_path / "runs" / "r"
    for step in (5, 10, 20):
        (folder / "checkpoints" / f"global_step_{step}" / "actor").mkdir(parents=True)
    (folder / "checkpoints/global_step_5/actor/fsdp_config.json").write_text('{"world_size": 2}')
    for step in (10, 20):
        hugging_face(folder / f"checkpoints/global_step_{step}/actor/huggingface")
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    for name in ("config.yaml", "manifest.json"):
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("below", "step", "backend"),
    [
        (".", 10, None),
        ("checkpoints", 10, None),
        ("checkpoints/global_step_20", 20, None),
        ("checkpoints/global_step_20/actor", 20, None),
        ("checkpoints/global_step_20/actor/huggingface", 20, None),
        ("checkpoints/global_step_5", 5, "fsdp"),
        ("checkpoints/global_step_5/actor", 5, "fsdp"),
    ],
)
def test_every_way_to_name_a_checkpoint_of_a_run(run, below, step, backend):
    checkpoint = find(str(run / below))
    assert (checkpoint.step, checkpoint.backend, checkpoint.run) == (step, backend, run)
    assert checkpoint.name == f"step_{step}"


def test_checkpoints_that_were_not_written_to_their_end_are_left_out(run):
    """verl's own file names the latest one before validation; a kill may leave anything in it."""
    retention.complete(run / "checkpoints/global_step_20", 20, {})
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("")
    assert find(str(run)).step == 20
    said = []
    assert [checkpoint.step for checkpoint in checkpoints_of(run, said.append)] == [20]
    assert [line.rsplit("/", 1)[1] for line in said] == [
        "global_step_5 was not written to its end",
        "global_step_10 was not written to its end",
    ]


def test_all_checkpoints_stand_in_order_of_their_steps(run, tmp_path):
    said = []
    # Step 5 lacks its shards; verl's rotation leaves a folder without actor behind.
    (run / "checkpoints" / "global_step_15").mkdir()
    assert [checkpoint.step for checkpoint in checkpoints_of(run, said.append)] == [10, 20]
    assert "global_step_5/actor is incomplete: model_world_size_2_rank_0.pt" in said[0]
    assert "global_step_15 holds no model" in said[1]
    for rank in range(2):
        (run / f"checkpoints/global_step_5/actor/model_world_size_2_rank_{rank}.pt").touch()
    assert [checkpoint.step for checkpoint in checkpoints_of(run, said.append)] == [5, 10, 20]
    with pytest.raises(CheckpointError, match="is not a run folder"):
        checkpoints_of(tmp_path, said.append)
    (run / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="is not a run folder"):
        checkpoints_of(run, said.append)


def test_megatron_shards_are_told_from_fsdp_ones(tmp_path):
    (tmp_path / "global_step_3" / "actor" / "model" / "dist_ckpt").mkdir(parents=True)
    assert find(str(tmp_path / "global_step_3")).backend == "megatron"


def test_a_plain_model_folder_belongs_to_no_run(tmp_path):
    checkpoint = find(str(hugging_face(tmp_path / "model")))
    assert (checkpoint.step, checkpoint.run, checkpoint.name) == (None, None, "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/does/not/exist", "does not exist"),
        ("not-a-hub-id", "does not exist"),
        ("no-such-owner/no-such-model", "neither a folder here nor to be had from the hub"),
    ],
)
def test_nothing_there(text, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=message):
        find(text)


def test_only_a_folder_is_merged(capsys):
    assert main(["merge", "runs/nope"]) == 2
    assert "runs/nope does not exist: give a run folder or one of its" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        find(str(tmp_path))


def test_the_fingerprint_is_of_names_and_contents(tmp_path):
    first, same, other = (hugging_face(tmp_path / name, text) for name, text in (("a", "w"), ("b", "w"), ("c", "v")))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    for folder, name in ((first, "vocab.json"), (same, "tokenizer.json")):  # the same contents in the same order
        (folder / name).write_text("{}")
    assert fingerprint(first) != fingerprint(same)


def test_a_checkpoint_of_a_run_with_tools_is_refused(run):
    loop = "{default_agent_loop: %s}"
    for name, refused in (("cppo_single_turn", False), ("cppo_tool_agent", True)):
        (run / "config.yaml").write_text(
            "data: {}\nreward: {custom_reward_function: {}}\nrun: {}\nmethod: {}\ntrainer: {}\ndivergence: {}\n"
            f"actor_rollout_ref: {{model: {{}}, rollout: {{val_kwargs: {{}}, agent: {loop % name}}}}}\n"
        )
        if refused:
            with pytest.raises(EvaluationError, match="was trained with tools"):
                run_config(find(str(run)))
        else:
            assert run_config(find(str(run))).actor_rollout_ref.rollout.agent.default_agent_loop == name
