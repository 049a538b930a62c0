"""One real stack (verl + Ray + vLLM + FSDP2 on the CPU): CPPO and a baseline train, the mask is the paper's, the
terminal and the run folder are what a person expects, and nothing is left running."""

import ipaddress
import json
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from doors import CANARIES, files_with, is_loopback, listeners, own_network
from leftovers import leftovers
from mask_oracle import divergences_of_response, mask_of_response
from rewards import some_groups_equal
from stack import run_stages

from cppo_verl import core
from cppo_verl.run.log import read_metrics

pytestmark = pytest.mark.live

# Thresholds (delta, delta_b) small enough that an untrained tiny model exceeds both within two minibatches: the first
# update moves the whole distribution (Top-K), the sampled token alone by far less (binary).
W_MIN = 0.8
TOPK, BINARY = (0.075, 0.065), (0.0005, 0.0001)
VOCABULARY = 55


def cppo(delta, delta_b):
    return ["method=cppo", f"method.delta={delta}", f"method.delta_b={delta_b}", f"method.w_min={W_MIN}"]


@pytest.fixture(scope="module")
def ray_folder():
    """Ray's own files; in a folder with a short name, because it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def live(live_base, live_folder, ray_folder):
    """What the terminal showed, each stage's metrics by step, where it listened; validated and saved at the end of the
    first."""
    plan = [
        ("cppo", [*cppo(*TOPK), "run.dump_steps=[1,3]"], 3),
        ("grpo", ["method=grpo"], 2),
        ("cppo over the whole vocabulary", [*cppo(*TOPK), f"divergence.k={VOCABULARY}", "run.dump_steps=[7]"], 2),
        ("cppo over binary TV", [*cppo(*BINARY), "divergence=binary_tv", "run.dump_steps=[9]"], 2),
    ]
    limit = f"actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs={VOCABULARY}"
    settings = [
        limit,
        "trainer.logger=[console,wandb]",
        "reward.custom_reward_function.name=some_groups_equal",
        *("trainer.val_before_train=true", "trainer.test_freq=3", "trainer.save_freq=3"),
    ]
    variables = {**CANARIES, "WANDB_MODE": "offline", "RAY_TMPDIR": str(ray_folder)}
    with listeners(live_folder) as found:
        shown, metrics = run_stages([*live_base, *settings], plan, 600, own_network(), variables)
    return shown, metrics, found


@pytest.fixture(scope="module")
def stages(live):
    return live[1]


@pytest.fixture(scope="module")
def dumps(stages, live_folder):
    """(step, minibatch) -> list of dumped micro-batches."""
    found = {}
    for path in sorted((live_folder / "dumps").glob("step_*/minibatch*.pt")):
        minibatch = int(path.name.removeprefix("minibatch").split("_")[0])
        found.setdefault((int(path.parent.name.removeprefix("step_")), minibatch), []).append(torch.load(path))
    return found


def test_cppo_and_a_baseline_train(stages):
    assert [len(lines) for lines in stages.values()] == [3, 2, 2, 2]
    for lines in stages.values():
        for line in lines:
            assert math.isfinite(line["actor/grad_norm"])
            assert line["actor/grad_norm"] > 0
            assert line["trust_region/tokens"] > 0
            assert line["rollout/missing_responses"] == 0


def test_truncated_responses_are_among_the_longest(stages):
    """verl counts those that end at the longest length as well."""
    for line in stages["cppo"]:
        assert 0 < line["rollout/truncation_rate"] <= line["response_length/clip_ratio"] < 1


def test_identical_weights_have_no_divergence_and_mask_nothing(dumps, stages):
    """Before the first update rollout and training run the same float32 weights."""
    assert stages["cppo"][0]["divergence/at_rollout_weights"] < 1e-4
    divergence = torch.cat([batch["divergence"][batch["response_mask"]] for batch in dumps[1, 0]])
    gate = torch.cat([batch["gate"][batch["response_mask"]] for batch in dumps[1, 0]])
    assert len(divergence) > 50
    assert divergence.mean() < 1e-4
    assert (gate == 1).all()


def test_a_plain_loop_trains_the_same_step(dumps, live_base, live_folder, tmp_path):
    """scripts/toy_table's training on the responses of step 1: both minibatches, the second after one update."""
    program, out = Path(__file__).parent / "plain_step.py", tmp_path / "plain"
    overrides = [*live_base, *cppo(*TOPK), "run.dump_steps=[1]"]
    command = [sys.executable, program, live_folder / "dumps" / "step_1", out, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VERL_PLATFORM": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    compared = moved = 0
    for minibatch in (0, 1):
        ours = [torch.load(file) for file in sorted((out / "dumps" / "step_1").glob(f"minibatch{minibatch}_*.pt"))]
        for batch, plain in zip(dumps[1, minibatch], ours, strict=True):
            valid = batch["response_mask"]
            assert torch.equal(plain["response_mask"], valid)
            for name in ("advantages", "log_prob", "divergence", "loss"):
                # Adam turns the rounding of a gradient near 0 into a part of the learning rate.
                near = 1e-6 if minibatch == 0 else 1e-3
                torch.testing.assert_close(plain[name][valid], batch[name][valid], rtol=0, atol=near, msg=name)
            compared += int(valid.sum())
            moved = max(moved, float((batch["log_prob"] - batch["rollout_log_prob"])[valid].abs().max()))
    print(f"{compared} tokens, the second minibatch moved by up to {moved:.3f}")
    assert compared > 200
    assert moved > 0.1


def test_mask_of_the_training_step_is_the_papers(dumps):
    """Token for token against the float64 loop, in minibatches after the first, but for tokens on a threshold."""
    compared, near = 0, 0
    masked = {"Top-K": Counter(), "binary": Counter()}
    for (step, minibatch), batches in dumps.items():
        kind = "binary" if step == 9 else "Top-K"
        delta, delta_b = BINARY if kind == "binary" else TOPK
        assert all(("topk_ids" in batch) == (kind == "Top-K") for batch in batches)
        for batch in batches if minibatch > 0 else []:
            for row in range(len(batch["response_mask"])):
                wanted, margin, causes = mask_of_response(batch, row, delta=delta, delta_b=delta_b, w_min=W_MIN)
                kept = (batch["gate"][row][batch["response_mask"][row]] == 1).tolist()
                for got, want, distance, cause in zip(kept, wanted, margin, causes, strict=True):
                    if distance < 1e-6:
                        near += 1
                        continue
                    assert got == want
                    compared += 1
                    masked[kind][cause] += not want
    print(f"compared {compared} tokens, {near} within 1e-6 of a threshold; masked: {masked}")
    for causes in masked.values():
        assert causes.total() >= 20
        assert min(causes["token"], causes["prefix"]) > 0


def test_divergence_of_the_training_step_is_that_of_a_float64_loop(dumps):
    """Every token of every dump: K = 20, K = the vocabulary, and the sampled token alone."""
    for batches in dumps.values():
        for batch in batches:
            for row, valid in enumerate(batch["response_mask"]):
                expected = torch.tensor(divergences_of_response(batch, row), dtype=torch.float64)
                assert torch.allclose(batch["divergence"][row][valid].double(), expected, rtol=0, atol=1e-6)


def test_log_probs_at_the_topk_are_the_models(dumps, live_assets):
    """Before the first update the weights are those on disk: a plain forward pass of transformers says the same."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(live_assets / "model", dtype=torch.float32)
    pad = model.config.pad_token_id or 0
    compared = 0
    for batch in dumps[1, 0]:
        assert batch["topk_ids"].shape[-1] == 20
        for row, valid in enumerate(batch["response_mask"]):
            prompt = batch["prompts"][row]
            prompt = prompt[prompt != pad] if pad in prompt else prompt
            response = batch["responses"][row][valid]
            with torch.no_grad():
                logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, batch["topk_ids"][row][valid].long())
            for name in ("topk_log_prob", "rollout_topk_log_prob"):
                assert torch.allclose(batch[name][row][valid], expected, rtol=0, atol=1e-5), name
            compared += expected.numel()
    assert compared > 50 * 20


def test_binary_topk_and_full_total_variation_are_ordered(dumps):
    """On every token of a real batch after its first update; K = vocabulary is the full total variation."""
    tokens = strictly = 0
    for batch in dumps[7, 1]:
        valid = batch["response_mask"]
        log_pi, log_mu = (batch[name][valid].double() for name in ("topk_log_prob", "rollout_topk_log_prob"))
        assert log_pi.shape[-1] == VOCABULARY
        assert ((log_pi.exp().sum(-1) - 1).abs() < 1e-5).all()
        full = 0.5 * (log_pi.exp() - log_mu.exp()).abs().sum(-1)
        assert torch.allclose(batch["divergence"][valid].double(), full, rtol=0, atol=1e-6)
        sampled = batch["responses"][valid]
        in_topk = (batch["topk_ids"][valid][:, :20] == sampled[:, None]).any(-1)
        own_pi, own_mu = batch["log_prob"][valid].double(), batch["rollout_log_prob"][valid].double()
        binary = core.binary_tv(own_pi[None], own_mu[None])[0]
        topk = core.topk_tv(own_pi[None], own_mu[None], log_pi[None, :, :20], log_mu[None, :, :20], in_topk[None])[0]
        assert (binary <= topk + 1e-6).all()
        assert (topk <= full + 1e-6).all()
        tokens += len(full)
        strictly += int(((binary + 1e-6 < topk) & (topk + 1e-6 < full)).sum())
    print(f"{tokens} tokens, {strictly} strictly between binary and full")
    assert strictly > 0.5 * tokens > 50


def test_reported_shares_are_those_of_the_dump(dumps, stages):
    """Metrics are exact over the tokens of a step, whatever its micro-batches."""
    batches = [batch for (step, _), found in dumps.items() if step == 3 for batch in found]
    valid = torch.cat([batch["response_mask"].flatten() for batch in batches])
    masked = torch.cat([(batch["gate"] < 1).flatten() for batch in batches]) & valid
    cause = torch.cat([batch["token_cause"].flatten() for batch in batches])
    divergence = torch.cat([batch["divergence"].flatten() for batch in batches]).double()
    line = stages["cppo"][2]
    assert line["trust_region/tokens"] == valid.sum()
    assert line["trust_region/masked"] == pytest.approx((masked.sum() / valid.sum()).item(), rel=1e-6)
    assert line["trust_region/masked_by_token"] == pytest.approx(
        ((masked & cause).sum() / valid.sum()).item(), rel=1e-6
    )
    assert line["divergence/mean"] == pytest.approx(divergence[valid].mean().item(), rel=1e-6)
    assert line["divergence/p99"] == pytest.approx(divergence[valid].quantile(0.99).item(), rel=0.08)
    bounds = [core.realised_bounds(batch["divergence"], batch["weights"], batch["response_mask"]) for batch in batches]
    responses = sum(int(batch["response_mask"].any(-1).sum()) for batch in batches)
    for name, column in (("bound/uniform", 0), ("bound/cppo", 1)):
        total = sum(bound[column].sum().item() for bound in bounds)
        assert line[name] == pytest.approx(total / responses, rel=1e-6)


def test_skipped_groups_and_only_they_are_left_out(dumps, stages, live_assets):
    """Rewards are computed again from the dumped tokens: the rows of a group whose rewards are equal have no token in
    the mask, all others have some. Every reward is 1 where the answer is a multiple of 3: every step has such groups.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(live_assets / "model")
    lines = {line["training/global_step"]: line for found in stages.values() for line in found}
    for step in {step for step, _ in dumps}:
        groups = {}
        for batch in (batch for (number, _), found in dumps.items() if number == step for batch in found):
            assert (batch["loss"][~batch["response_mask"]] == 0).all()
            for row, used in enumerate(batch["response_mask"].any(-1).tolist()):
                prompt = tokenizer.decode(batch["prompts"][row], skip_special_tokens=True)
                problem = re.search(r"([0-9+-]+)\?", prompt)[1]
                response = tokenizer.decode(batch["responses"][row], skip_special_tokens=True)
                reward = some_groups_equal("arithmetic", response, eval(problem))["acc"]
                groups.setdefault(problem, []).append((reward, used))
        skipped = [rows for rows in groups.values() if len({reward for reward, _ in rows}) == 1]
        assert [len(rows) for rows in groups.values()] == [4] * 8
        assert len(skipped) == lines[step]["groups/zero_variance"] > 0
        assert lines[step]["groups/total"] == 8
        assert len(skipped) < 8
        for rows in groups.values():
            assert {used for _, used in rows} == {rows not in skipped}


def test_terminal_shows_steps_and_a_summary_and_nothing_of_ray(live):
    lines = live[0].splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert "before training" in steps[0]
    assert [line.split()[1] for line in steps[1:]] == [f"{number}/9" for number in range(1, 10)]
    assert all(word in steps[1] for word in ("reward", "masked", "token", "prefix", "ETA"))
    assert ["Avg@16" in line for line in steps] == [number in (0, 3) for number in range(10)]
    assert any(line.startswith("arithmetic Avg@16") and "points" in line for line in lines)
    assert not [line for line in lines if "TaskRunner" in line or "WARNING" in line or "pid=" in line]
    assert len(lines) < 50


def test_run_folder_is_complete(live, live_folder):
    manifest = json.loads((live_folder / "manifest.json").read_text())["attempts"][0]
    assert manifest["packages"]["verl"] == "0.9.1"
    assert manifest["command"].startswith("tests/live/stack.py")
    assert manifest["hardware"]["cores"] > 0
    metrics = read_metrics(live_folder)
    assert sorted(metrics) == list(range(10))
    assert metrics[2]["trust_region/tokens"] > 0
    for name in ("config.yaml", "summary.json", "plots/training.png", "plots/mask.png", "logs/train-1.log"):
        assert (live_folder / name).stat().st_size > 0
    samples = [json.loads(line) for line in (live_folder / "validation/3.jsonl").read_text().splitlines()]
    assert len(samples) == 8 * 16
    assert {sample["data_source"] for sample in samples} == {"arithmetic"}
    assert (live_folder / "checkpoints/global_step_3/complete.json").is_file()
    assert (live_folder / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "3"


def test_nothing_listens_but_for_this_machine(live):
    """Every socket of every process, in a network with an address for others where this machine allows one."""
    names = {name for name, _ in live[2]}
    for name in ("gcs_server", "raylet", "ray::TopKServer", "ray::TransferQueueController", "ray::WorkerDict"):
        assert name in names, names
    assert [found for found in sorted(live[2]) if not is_loopback(found[1])] == []


def test_a_socket_for_others_would_be_seen(tmp_path):
    """The same look at a process that opens one for each."""
    hosts = ("127.0.0.1", "::ffff:127.0.0.1", "0.0.0.0", "::")
    script = (
        "import socket, sys, time\n"
        "def make(host, six):\n"
        "    family = socket.AF_INET6 if six else socket.AF_INET\n"
        "    return socket.create_server((host, 0), family=family, dualstack_ipv6=six)\n"
        "kept = [make(host, ':' in host) for host in sys.argv[1:]]\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [*own_network(), sys.executable, "-c", script, *hosts]
    variables = {**os.environ, "CPPO_RUN_FOLDER": str(tmp_path)}
    with listeners(tmp_path) as found, subprocess.Popen(command, env=variables, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(2.5)
        process.kill()
    seen = {address for _, address in found}
    assert {ipaddress.ip_address(address) for address in seen} == {ipaddress.ip_address(host) for host in hosts}
    assert {address for address in seen if not is_loopback(address)} == {"0.0.0.0", "::"}


def test_no_file_of_the_run_or_of_ray_holds_a_secret(live, live_folder, ray_folder):
    """wandb's files hold the configuration; Ray's hold what it logs."""
    assert list((live_folder / "wandb").glob("offline-run-*/*.wandb"))
    assert list(ray_folder.rglob("raylet.out"))
    assert files_with(CANARIES.values(), live_folder.parent, ray_folder) == []


def test_the_run_folder_is_the_users_alone(live, live_folder):
    assert stat.S_IMODE(live_folder.stat().st_mode) == 0o700
    files = [path for path in live_folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.stat().st_mode & 0o077] == []


def test_nothing_is_left_running(live, live_folder):
    assert leftovers(live_folder) == []
