"""A run that is killed, that computes nonsense, whose disk fills up: what is lost, what is said, how it goes on."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from kill_sweep import TARGETS, Moment, Sweep
from small_run import base_overrides

from cppo_verl.checkpoint import retention
from cppo_verl.run.log import read_lines, read_metrics

pytestmark = [pytest.mark.live, pytest.mark.slow]
CPPO = Path(sys.executable).parent / "cppo"
STEPS = 6


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """With a run of six steps that nothing disturbed; at a small learning rate (docs/operations.md: rounding)."""
    sweep = Sweep(tmp_path_factory.mktemp("sweep"), steps=STEPS, extra=["actor_rollout_ref.actor.optim.lr=5e-5"])
    assert sweep.run("unbroken") == 0, (sweep.folder / "unbroken.log").read_text()
    return sweep


def test_a_run_killed_at_a_random_moment_ends_as_one_that_was_not(sweep):
    """One sample of kill_sweep.py, at another moment in every run of the tests; the seed is printed."""
    seed = random.SystemRandom().randrange(1 << 32)
    seeded = random.Random(seed)
    target, moment = seeded.choice(list(TARGETS)), Moment.drawn(seeded, STEPS, kills=1)
    print(f"seed {seed}: {target}, {moment}")
    kill = sweep.kill_once("killed", target, moment)
    assert kill["exit_status"] != 0
    assert kill["seconds_to_end"] < 60
    assert kill["processes_left"] == 0
    assert sweep.run("killed") == 0, (sweep.folder / "killed.log").read_text()
    verdict = sweep.compare("unbroken", "killed")
    print(json.dumps({**kill, **verdict}))
    assert verdict["largest_advantage"] > 0.1
    assert verdict["weights_moved"] > 1e-4
    assert verdict["every_step_once"]
    assert verdict["responses_equal"] == verdict["responses"] == STEPS * 32
    assert verdict["weights_differ"] <= 1e-6
    assert verdict["validations"] == 2  # of steps 3 and 6, one set
    assert verdict["validations_equal"]


def test_the_same_seed_without_the_mask_ends_elsewhere(sweep):
    """The off-switch, measured by what found the killed run equal."""
    assert sweep.run("open", "method.delta=1e9", "method.delta_b=null") == 0, (sweep.folder / "open.log").read_text()
    verdict = sweep.compare("unbroken", "open")
    print(json.dumps(verdict))
    assert verdict["every_step_once"]
    assert verdict["weights_differ"] > 1e-4


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two checkpoints of 10 MB and little else."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=26m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_nonsense_and_a_full_disk_stop_the_run_and_lose_nothing(live_assets, small_disk, tmp_path):
    """One run in three attempts: rewards that turn NaN in step 2, no room for the third checkpoint, then to the end."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from rewards import compute_score as plain\n"
        "calls = 0\n"
        "def compute_score(*arguments, **named):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    verdict = plain(*arguments, **named)\n"
        "    nonsense = os.environ.get('NONSENSE') and calls > 32\n"  # one step has 32 responses
        "    return {**verdict, 'score': float('nan')} if nonsense else verdict\n"
    )
    run = small_disk / "r"
    command = [
        *(CPPO, "train", *base_overrides(live_assets), f"reward.custom_reward_function.path={reward}"),
        *(f"run.dir={small_disk}", "run.name=r", "run.resume=auto", "trainer.save_freq=1", "trainer.test_freq=4"),
        *("trainer.total_training_steps=4", "trainer.logger=[console,wandb,tensorboard]"),
    ]

    def attempt(*extra, **variables):
        environment = {**os.environ, "WANDB_MODE": "offline", **variables}
        return subprocess.run([*command, *extra], capture_output=True, text=True, timeout=900, env=environment)

    nonsense = attempt(NONSENSE="1")
    assert nonsense.returncode not in (0, 130), nonsense.stdout
    assert "ValueError: the reward function returned score = nan for a response" in nonsense.stdout
    assert retention.complete_steps(run / "checkpoints") == [1]

    full = attempt()
    assert full.returncode not in (0, 130), full.stdout
    assert "global_step_3 could not be written and was removed" in full.stdout
    assert "the last complete one is" in full.stdout
    assert "trainer.max_actor_ckpt_to_keep" in full.stdout
    assert retention.complete_steps(run / "checkpoints") == [1, 2]
    assert not (run / "checkpoints/global_step_3").exists()

    done = attempt("trainer.max_actor_ckpt_to_keep=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert retention.complete_steps(run / "checkpoints") == [4]

    names = set().union(*read_metrics(run).values()) - {"step", "time"}
    assert scalars_of_tensorboard(run / "tensorboard") == names
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1  # one run for wandb
    logged = [history for folder in folders for history in wandb_histories(folder)]
    assert {step for step, _ in logged} == {1, 2, 3, 4}
    assert set().union(*(keys for _, keys in logged)) - {"_runtime", "_step", "_timestamp"} == names


def scalars_of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = set()
    for file in folder.glob("events.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        names |= set(events.Tags()["scalars"])
    return names


def wandb_histories(folder):
    """(step, names) of each logged line of an offline run; the file is a LevelDB log of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    data, position, parts, found = file.read_bytes(), 7, [], []
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            if record.WhichOneof("record_type") == "history":
                keys = {item.key or "/".join(item.nested_key) for item in record.history.item}
                found.append((record.history.step.num, keys))
    return found
