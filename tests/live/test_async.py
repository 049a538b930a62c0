"""Asynchronous training as a person starts it: interrupted responses, their rows and versions, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from leftovers import leftovers
from mask_oracle import divergences_of_response, mask_of_response

from cppo_verl.run.log import read_metrics

pytestmark = [pytest.mark.live, pytest.mark.slow]
CPPO = Path(sys.executable).parent / "cppo"
STEPS = 4
DELTA, DELTA_B, W_MIN = 0.075, 0.065, 0.8
# Few responses at a time, so that a batch is full long before all are.
SLOW = ["actor_rollout_ref.rollout.max_num_seqs=6", f"method.delta={DELTA}", f"method.delta_b={DELTA_B}"]


def train(overrides, *more, timeout=900):
    done = subprocess.run([CPPO, "train", *overrides, *more], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


MODES = ["colocate_async", "separate_async"]
in_async_modes = pytest.mark.parametrize("run", MODES, indirect=True, scope="module")


@pytest.fixture(scope="module", params=[*MODES, "staleness"])
def run(request, live_base, live_folder):
    """A run of four steps with everything dumped and every version of the weights kept."""
    folder = live_folder.parent / request.param
    how = ["mode=sync", "run.staleness=2"] if request.param == "staleness" else [f"mode={request.param}"]
    overrides = [*live_base, *SLOW, *how, f"run.name={folder.name}"]
    if request.param == "separate_async":
        overrides.append("trainer.v1.separate_async.parameter_sync_step=2")
    overrides += [f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1"]
    train(overrides, f"run.dump_steps={list(range(1, STEPS + 1))}")
    return folder, overrides


@pytest.fixture(scope="module")
def dumps(run):
    """(step, minibatch) to its micro-batches."""
    found = {}
    for step in range(1, STEPS + 1):
        for file in sorted((run[0] / "dumps" / f"step_{step}").glob("*.pt")):
            minibatch = int(file.name.removeprefix("minibatch").partition("_")[0])
            found.setdefault((step, minibatch), []).append(torch.load(file))
    return found


def tokens_of(dumps):
    """(step, batch, row, valid) of every dumped response."""
    for (step, _), batches in dumps.items():
        for batch in batches:
            for row, valid in enumerate(batch["response_mask"]):
                yield step, batch, row, valid


@in_async_modes
def test_responses_were_interrupted_and_the_guards_held(run, dumps):
    lines = read_metrics(run[0])
    spans = max(lines[step]["training/off_policy/trajectory_spans/max"] for step in range(1, STEPS + 1))
    assert spans > 1
    torn = sum(len(batch["age"][row][valid].unique()) > 1 for _, batch, row, valid in tokens_of(dumps))
    print(f"{torn} responses of several versions, at most {spans:g}")
    assert torn > 0
    assert all(lines[step]["rollout/missing_responses"] == 0 for step in range(1, STEPS + 1))


@pytest.mark.parametrize("run", ["staleness"], indirect=True, scope="module")
def test_with_a_known_staleness_every_token_has_that_age(run, dumps):
    """The first steps have no weights as old as that to generate with."""
    ages = {step: set() for step in range(1, STEPS + 1)}
    for step, batch, row, valid in tokens_of(dumps):
        ages[step] |= set(batch["age"][row][valid].tolist())
    assert ages == {1: {0}, 2: {1}, 3: {2}, 4: {2}}
    lines = read_metrics(run[0])
    assert all(lines[step]["rollout/missing_responses"] == 0 for step in lines)
    first, *stale = (lines[step]["divergence/at_rollout_weights"] for step in sorted(lines))
    assert first < 1e-4
    assert min(stale) > 1e-3


def test_every_token_names_the_weights_that_sampled_it(run, dumps, live_assets):
    """log mu and its Top-K rows are those of that version's checkpoint; of no other one."""
    from transformers import AutoModelForCausalLM

    from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB

    models = {0: AutoModelForCausalLM.from_pretrained(live_assets / "model", dtype=torch.float32)}
    pad = models[0].config.pad_token_id or 0
    for version in range(1, STEPS):
        state = run[0] / "checkpoints" / f"global_step_{version}" / "actor" / "model_world_size_1_rank_0.pt"
        weights = torch.load(state, weights_only=False)
        model = AutoModelForCausalLM.from_pretrained(live_assets / "model", dtype=torch.float32)
        model.load_state_dict({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in weights.items()})
        models[version] = model
    compared, told_apart = Counter(), 0
    for step, batch, row, valid in tokens_of(dumps):
        prompt = batch["prompts"][row]
        prompt = prompt[prompt != pad]
        response = batch["responses"][row][valid]
        if not len(response):
            continue
        ages = batch["age"][row][valid]
        assert (ages >= 0).all()
        log_mu = {}
        for version in range(step):
            with torch.no_grad():
                logits = models[version](torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            log_mu[version] = logits.log_softmax(-1)
        for t, age in enumerate(ages.tolist()):
            version = step - 1 - age
            ids = batch["topk_ids"][row][valid][t].long()
            rows, own = batch[ROLLOUT_TOPK_LOG_PROB][row][valid][t], batch["rollout_log_prob"][row][valid][t]
            assert torch.allclose(rows, log_mu[version][t][ids], rtol=0, atol=1e-4), (step, version, t)
            assert abs(own - log_mu[version][t][response[t]]) < 1e-4
            compared[age] += 1
            others = [other for other in log_mu if other != version]
            told_apart += any((rows - log_mu[other][t][ids]).abs().max() > 1e-3 for other in others)
    print(f"tokens by age: {dict(sorted(compared.items()))}; {told_apart} differ under another version's weights")
    assert len(compared) >= 2
    assert min(compared[0], compared[1]) > 50
    assert told_apart > 0.5 * compared.total()


def test_divergence_and_mask_are_the_float64_loops_at_every_age(dumps):
    masked = Counter()
    for _, batch, row, valid in tokens_of(dumps):
        expected = torch.tensor(divergences_of_response(batch, row), dtype=torch.float64)
        assert torch.allclose(batch["divergence"][row][valid].double(), expected, rtol=0, atol=1e-6)
        kept = (batch["gate"][row][valid] == 1).tolist()
        wanted, margin, _ = mask_of_response(batch, row, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN)
        for got, want, distance, age in zip(kept, wanted, margin, batch["age"][row][valid].tolist(), strict=True):
            assert got == want or distance < 1e-6
            masked[age] += not want
    print(f"masked tokens by age: {dict(sorted(masked.items()))}")
    assert masked.total() > 20


def test_metrics_by_age_are_exact_over_the_tokens_of_a_step(run, dumps):
    lines = read_metrics(run[0])
    for step in range(1, STEPS + 1):
        batches = [batch for (of, _), found in dumps.items() if of == step for batch in found]
        valid = torch.cat([batch["response_mask"].flatten() for batch in batches])
        age, gate, divergence = (
            torch.cat([batch[name].flatten() for batch in batches])[valid] for name in ("age", "gate", "divergence")
        )
        line = lines[step]
        assert line["trust_region/tokens"] == len(age)
        assert line["trust_region/masked"] == pytest.approx((gate < 1).double().mean().item())
        assert line["staleness/mean"] == pytest.approx(age.double().mean().item())
        for number in range(4):
            of_age = age == number
            assert line[f"staleness/tokens_age_{number}"] == pytest.approx(of_age.double().mean().item())
            if of_age.any():
                mean = divergence[of_age].double().mean().item()
                assert line[f"staleness/divergence_age_{number}"] == pytest.approx(mean, rel=1e-5)
                assert line[f"staleness/masked_age_{number}"] == pytest.approx(
                    (gate[of_age] < 1).double().mean().item()
                )


@in_async_modes
def test_killed_and_resumed_no_response_is_lost_or_trained_twice(run, tmp_path):
    """SIGKILL after the second step; what had been submitted by then is trained once, in whichever attempt."""
    folder, overrides = run
    mode = folder.name
    overrides = [word for word in overrides if not word.startswith("run.name=")] + [f"run.dir={tmp_path}", "run.name=k"]
    killed = tmp_path / "k"
    command = [CPPO, "train", *overrides, f"run.dump_steps={list(range(1, STEPS + 1))}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.time() + 600
    while time.time() < until and not (killed / "checkpoints/global_step_2/complete.json").exists():
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while leftovers(killed) and time.time() < until:
        time.sleep(0.2)
    train(overrides, f"run.dump_steps={list(range(1, STEPS + 1))}", "run.resume=true")
    lines = read_metrics(killed)
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert all(lines[step]["rollout/missing_responses"] == 0 for step in lines)
    prompts = Counter()
    for step in range(1, STEPS + 1):
        for file in (killed / "dumps" / f"step_{step}").glob("*.pt"):
            batch = torch.load(file)
            prompts.update(tuple(row.tolist()) for row in batch["prompts"])
    # 64 problems, 8 a step: no problem comes twice in four steps, and each has its four responses.
    print(f"{mode}: {len(prompts)} prompts, responses of each: {Counter(prompts.values())}")
    assert set(prompts.values()) == {4}
    assert len(prompts) == 8 * STEPS


def test_what_it_leaves(run):
    assert leftovers(run[0]) == []
    events = [json.loads(line)["event"] for line in (run[0] / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "finished"
