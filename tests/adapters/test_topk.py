"""The actor's side of the Top-K divergence: alignment, precision, guards, and every way of dividing the logits."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from topk_cases import VOCABULARY, K, expected_log_probs, micro_batch, nested
from torch.utils._python_dispatch import TorchDispatchMode

from cppo_verl.adapters.actor import topk
from cppo_verl.adapters.actor.log_prob import token_log_probs
from cppo_verl.adapters.actor.topk import TopKError, TopKLogits, gather_logits, response_markers
from cppo_verl.adapters.columns import ROLLOUT_TOPK_LOG_PROB, TOPK_COLUMNS, TOPK_IDS

PARALLEL = Path(__file__).with_name("parallel.py")
MEGATRON_CORE = "0.16.1"
LENGTHS = [5, 1, 9, 3]


def run(case, collector=None):
    data, logits, log_pi, log_mu, valid = case
    collector = collector or TopKLogits()
    collector.collect(logits.unsqueeze(0), data)
    return collector.finish(log_pi, log_mu, valid, data)


def worst_error(result, data, logits):
    errors = [
        (result.topk_log_prob[row, : len(rows)].double() - torch.tensor(rows).double()).abs().max().item()
        for row, rows in enumerate(expected_log_probs(data, logits))
        if rows
    ]
    return max(errors)


def test_markers_number_the_token_that_a_position_predicts():
    data, *_ = micro_batch([2, 3])  # prompts of 3 and 4 tokens
    assert response_markers(data).tolist() == [0, 0, 1, 2, 0, *[0, 0, 0, 3, 4, 5, 0]]


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [4, 4, 4], [3, 0, 2], [0, 0]])
def test_log_probs_at_the_rollouts_ids(lengths):
    case = micro_batch(lengths)
    result = run(case)
    assert result.topk_log_prob.shape == (len(lengths), max(lengths), K)
    if any(lengths):
        assert worst_error(result, case[0], case[1]) < 1e-5
    for row, length in enumerate(lengths):
        sampled, ids = case[0]["responses"][row], case[0][TOPK_IDS][row]
        wanted = [token.item() in row_ids.tolist() for token, row_ids in zip(sampled, ids, strict=True)]
        assert result.sampled_in_topk[row, :length].tolist() == wanted


def test_a_dense_batch_of_equal_lengths_is_the_same():
    case = micro_batch([4, 4, 4])
    reference = run(case)
    dense = case[0].clone()
    for name in TOPK_COLUMNS:
        dense[name] = torch.stack(list(case[0][name].unbind()))
    assert torch.equal(run((dense, *case[1:])).topk_log_prob, reference.topk_log_prob)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_normaliser_from_the_sampled_token_costs_a_rounding_of_the_largest_logit(scale):
    """log Z = logit_y - log pi(y) needs no softmax; below 1e-5 in probability for logits up to 40 (scale 10)."""
    data, logits, _, log_mu, valid = micro_batch([400], scale=scale, vocabulary=2000)
    direct = logits[2:-1].log_softmax(-1)
    log_pi = direct.gather(-1, data["responses"][0][:, None]).T
    exact = torch.tensor(expected_log_probs(data, logits)[0]).double().exp()
    result = run((data, logits, log_pi, log_mu, valid))
    error = (result.topk_log_prob[0].double().exp() - exact).abs().max().item()
    error_direct = (direct.gather(-1, data[TOPK_IDS][0].long()).double().exp() - exact).abs().max().item()
    largest = logits.abs().max().item()
    print(f"logits up to {largest:.0f}: probabilities off by {error:.1e}, by float32 log_softmax {error_direct:.1e}")
    assert error <= torch.finfo(torch.float32).eps * max(largest, 1.0)
    assert error < 1e-5 or scale > 10


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_half_precision_logits_give_exact_log_probs(temperature):
    """With log pi in float32 of the same logits; verl's own in bfloat16 would move every row."""
    data, logits, _, log_mu, _ = micro_batch(LENGTHS)
    half = logits.bfloat16()
    rows = None if temperature is None else torch.full((len(half),), temperature)
    scaled = half.float() if temperature is None else half.float() / temperature

    def topk_of(log_pi):
        collector, starts = TopKLogits(), [2, 11, 17, 32]
        collector.collect(half.unsqueeze(0), data, temperature=rows)
        picked = [log_pi[start : start + n] for start, n in zip(starts, LENGTHS, strict=True)]
        log_pi = torch.nn.utils.rnn.pad_sequence(picked, batch_first=True)
        return collector.finish(log_pi, log_mu, torch.zeros_like(log_mu).bool(), data)  # no token is guarded

    labels = data["input_ids"].values().roll(-1)
    assert worst_error(topk_of(token_log_probs(half, labels, rows)[0]), data, scaled) < 1e-5
    verls = scaled.bfloat16().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert worst_error(topk_of(verls), data, scaled) > 1e-3


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation makes anew."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_second_buffer_of_logits_and_no_change_of_them():
    tokens, vocabulary = 1000, 5000
    logits = torch.randn(1, tokens, vocabulary, requires_grad=True)
    before = logits.detach().clone()
    ids = torch.randint(vocabulary, (tokens, K + 1))
    markers = torch.arange(1, tokens + 1)[None]
    with LargestTensor() as seen, torch.no_grad():
        picked = gather_logits(logits, markers, ids, 0, [], torch.ones(tokens))
    assert not picked.requires_grad
    assert torch.equal(logits, before)
    assert seen.largest <= tokens * (K + 1)
    with LargestTensor() as seen:
        logits.log_softmax(-1)
    assert seen.largest == logits.numel()


# Guards: every way in which a row can be misplaced.


def shifted(data, row=2):
    for name in TOPK_COLUMNS:
        data[name] = nested([r.roll(1, 0) if i == row else r for i, r in enumerate(data[name].unbind())])


def swapped(data):
    for name in TOPK_COLUMNS:
        rows = [row.clone() for row in data[name].unbind()]
        rows[2][[3, 6]] = rows[2][[6, 3]]
        data[name] = nested(rows)


def truncated(data):
    for name in TOPK_COLUMNS:
        data[name] = nested([row[:-1] if i == 2 else row for i, row in enumerate(data[name].unbind())])


def moved_between_responses(data):
    """Lengths that add up, so that only the lengths of each response tell."""
    for name in TOPK_COLUMNS:
        rows = list(data[name].unbind())
        rows[0], rows[2] = torch.cat([rows[0], rows[2][:1]]), rows[2][1:]
        data[name] = nested(rows)


def outside(data):
    data[TOPK_IDS].values()[7, 19] = VOCABULARY


def negative(data):
    data[TOPK_IDS].values()[7, 19] = -1


def not_a_number(data):
    data[ROLLOUT_TOPK_LOG_PROB].values()[7, 3] = float("nan")


def lacking(data):
    ids, sampled = data[TOPK_IDS].values(), data["responses"].values()
    row = next(i for i in range(len(ids)) if sampled[i] in ids[i, : K // 2])
    ids[row, ids[row] == sampled[row]] = next(n for n in range(VOCABULARY) if n not in ids[row])


def too_probable(data):
    data[ROLLOUT_TOPK_LOG_PROB].values()[7, 10:] = -0.1


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (shifted, r"sampled token is (stored|missing).*response 2 of the micro-batch"),
        (swapped, r"sampled token is (stored|missing).*token [36] of response 2"),
        (truncated, r"response 2 .*has 9 tokens, but topk_ids has 8 rows"),
        (moved_between_responses, r"response 0 .*has 5 tokens, but topk_ids has 6 rows"),
        (outside, r"an id is outside the vocabulary: token 1 of response 2"),
        (negative, r"an id is outside the vocabulary"),
        (not_a_number, r"NaN or above 0: token 1 of response 2"),
        (too_probable, r"add up to more than 1"),
        (lacking, r"the sampled token is missing although"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_guards_stop_on_misplaced_rows(plant, message, dtype):
    case = micro_batch(LENGTHS, dtype=dtype)
    run(case)  # untouched, the same batch passes
    case[0]["uid"] = ["a", "b", "c", "d"]
    plant(case[0])
    with pytest.raises(TopKError, match=message) as caught:
        run(case)
    assert "uid" in str(caught.value)


def test_a_shift_by_one_of_every_response_is_caught_whatever_the_seed():
    """One clean batch, many shifts: the guard needs one token out of a response to notice."""
    for seed in range(50):
        case = micro_batch([8, 8], seed=seed)
        run(case)
        for row in range(2):
            shifted(case[0], row)
        with pytest.raises(TopKError):
            run(case)


def test_logits_of_a_neighbouring_position_are_caught(monkeypatch):
    """The actor's own half of the alignment: with one row off, what should be probabilities add up to more than 1."""

    def off_by_one(data):
        return response_markers(data).roll(1)

    monkeypatch.setattr(topk, "response_markers", off_by_one)
    for seed in range(30):
        with pytest.raises(TopKError, match="the policy's own probabilities add up to more than 1"):
            run(micro_batch(LENGTHS, seed=seed))


def test_padding_and_prompts_are_not_guarded():
    """verl's one-token padding rows carry a copy of somebody else's first row; response_mask is 0 there."""
    data, logits, log_pi, log_mu, valid = micro_batch(LENGTHS)
    log_mu[1, 0] = 0.0
    with pytest.raises(TopKError):
        run((data, logits, log_pi, log_mu, valid))
    valid[1] = False
    run((data, logits, log_pi, log_mu, valid))


def test_an_engine_that_skips_the_hook_is_noticed():
    data, _, log_pi, log_mu, valid = micro_batch(LENGTHS)
    with pytest.raises(RuntimeError, match="did not call the logits hook"):
        TopKLogits().finish(log_pi, log_mu, valid, data)


# Logits divided over ranks, on gloo.


@pytest.fixture(scope="session")
def megatron_core(tmp_path_factory):
    """Megatron's process groups, from the package index; needs no GPU."""
    folder = tmp_path_factory.mktemp("megatron")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [*command, f"megatron-core=={MEGATRON_CORE}"], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"megatron-core {MEGATRON_CORE} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def on_ranks(layouts, world, path):
    """What each rank printed; all layouts are checked in one start of the processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PARALLEL), *layouts],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = []
    for process in ranks:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors[-3000:]
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sequence_parallel_ranks_get_the_single_process_result(world):
    for output in on_ranks(["ulysses"], world, []):
        assert "ulysses : equal to the single process within" in output


@pytest.mark.parametrize(
    ("world", "layouts"),
    [(2, ["2x1", "1x2"]), pytest.param(4, ["4x1", "2x2", "1x4"], marks=pytest.mark.slow)],
)
def test_megatron_ranks_get_the_single_process_result(megatron_core, world, layouts):
    """Megatron's own groups (tensor x context parallelism) and verl's own layouts; Megatron's model is not run."""
    for output in on_ranks(layouts, world, [megatron_core]):
        for layout in layouts:
            for data_format in ("thd", "bshd"):
                assert f"{layout} {data_format}: equal to the single process within" in output
