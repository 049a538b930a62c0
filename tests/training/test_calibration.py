"""``cppo calibrate``: its shares are the mask's own, the floor is that of untouched weights, nothing is made up."""

import itertools
import json
import math

import pytest
import torch
from mask_oracle import mask_of_response

from cppo_verl.cli import main
from cppo_verl.training.calibration import describe, masked, suggest, top_k

W_MIN = 0.8


def dump(seed, rows=6, length=30, age=None, moved=0.6):
    draw = torch.Generator().manual_seed(seed)
    log_mu = -2 * torch.rand(rows, length, generator=draw) - 0.2
    log_pi = (log_mu + moved * torch.randn(rows, length, generator=draw)).clamp_max(-0.01)
    lengths = torch.randint(3, length + 1, (rows,), generator=draw)
    valid = torch.arange(length) < lengths[:, None]
    return {
        "log_prob": log_pi,
        "rollout_log_prob": log_mu,
        "advantages": torch.randn(rows, 1, generator=draw).expand(rows, length).contiguous(),
        "divergence": (log_pi.exp() - log_mu.exp()).abs(),
        "response_mask": valid,
        "responses": torch.randint(0, 50, (rows, length), generator=draw),
        **({} if age is None else {"age": torch.full((rows, length), age, dtype=torch.int32)}),
    }


@pytest.mark.parametrize(("delta", "delta_b"), [(0.15, 0.015), (0.1, 0.05), (0.3, 0.0)])
def test_shares_are_those_of_the_float64_loop(delta, delta_b):
    batches = [dump(1), dump(2)]
    dropped = by_prefix = tokens = 0
    for batch in batches:
        for row in range(len(batch["responses"])):
            keep, _, causes = mask_of_response(batch, row, delta=delta, delta_b=delta_b, w_min=W_MIN)
            tokens += len(keep)
            dropped += keep.count(False)
            by_prefix += sum(not kept and cause == "prefix" for kept, cause in zip(keep, causes, strict=True))
    share = masked(batches, delta, delta_b, W_MIN)
    assert dropped > by_prefix > 0
    assert share == pytest.approx((dropped / tokens, by_prefix / tokens))
    assert masked(batches, 1e9, None, W_MIN) == (0, 0)


def test_the_floor_is_that_of_tokens_under_the_weights_that_sampled_them():
    same = dump(3, moved=1e-4)
    later, stale = (dump(4), 1), (dump(5, age=1), 0)
    floor = describe([(same, 0), later, stale])["floor"]
    valid = same["response_mask"]
    assert floor["tokens"] == valid.sum()
    assert floor["mean"] == pytest.approx(same["divergence"][valid].double().mean().item())
    assert describe([later, stale])["floor"] is None


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_a_suggestion_masks_the_share_that_was_asked_for_and_a_smaller_one_more(share):
    batches = [dump(6), dump(7)]
    hint = suggest(batches, None, share, W_MIN)
    assert hint.delta == pytest.approx(10 * hint.delta_b, rel=0.05)
    assert f"masks {100 * share:g}% of these tokens" in hint.reason
    tokens = sum(int(batch["response_mask"].sum()) for batch in batches)
    at = masked(batches, hint.delta, hint.delta_b, W_MIN).masked
    below = masked(batches, 0.94 * hint.delta, 0.94 * hint.delta_b, W_MIN).masked
    assert below >= share - 2 / tokens
    assert at <= share + 2 / tokens
    assert below > at or share * tokens < 3


def test_a_suggestion_is_above_the_floor_and_says_why():
    high = suggest([dump(6)], {"mean": 0.4}, 0.02, W_MIN)
    assert high.delta_b == pytest.approx(0.8)
    assert "mismatch" in high.reason
    still = suggest([dump(6, moved=0.0)], None, 0.02, W_MIN)
    assert "hardly a token has moved" in still.reason


def with_top_k(batch, seed, vocabulary=50, k=4):
    """The dump of two random distributions over a small vocabulary, and both of them."""
    draw = torch.Generator().manual_seed(seed)
    shape = (*batch["responses"].shape, vocabulary)
    mu, pi = (torch.log_softmax(2 * torch.randn(shape, generator=draw), -1) for _ in range(2))
    kept, ids = mu.topk(k, -1)
    sampled = batch["responses"].unsqueeze(-1)
    named = {
        "log_prob": pi.gather(-1, sampled).squeeze(-1),
        "rollout_log_prob": mu.gather(-1, sampled).squeeze(-1),
        **{"topk_ids": ids, "rollout_topk_log_prob": kept, "topk_log_prob": pi.gather(-1, ids)},
    }
    return {**batch, **named}, mu, pi


def test_what_the_k_leave_over_is_counted_token_for_token():
    batch, mu, pi = with_top_k(dump(7), 7)
    tokens = outside = 0
    rest_mu = rest_pi = 0.0
    for row, t in batch["response_mask"].nonzero().tolist():
        ids = set(batch["topk_ids"][row, t].tolist())
        outside += batch["responses"][row, t].item() not in ids
        others = [token for token in range(50) if token not in ids | {batch["responses"][row, t].item()}]
        rest_mu += sum(math.exp(mu[row, t, token]) for token in others)
        rest_pi += sum(math.exp(pi[row, t, token]) for token in others)
        tokens += 1
    assert 0 < outside < tokens
    found = top_k([batch, batch])
    assert found == pytest.approx(
        {"outside": outside / tokens, "other_mu": rest_mu / tokens, "other_pi": rest_pi / tokens}
    )
    assert top_k([batch, dump(8)]) is None


def test_the_command(tmp_path, capsys):
    run = tmp_path / "r"
    (run / "dumps/step_1").mkdir(parents=True)
    assert main(["calibrate", str(run)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main(["calibrate", str(run), "--w-min", "0"]) == 2
    assert "--w-min=0: the last token's weight must be above 0" in capsys.readouterr().err
    assert main(["calibrate", str(run), "--share", "0"]) == 2
    assert "--share=0: a budget that masks nothing is none" in capsys.readouterr().err
    rest = "actor_rollout_ref: {}\ndata: {}\nrun: {}\ntrainer: {}\n"
    own = "method: {name: cppo, w_min: 0.8}\ndivergence: {name: binary_tv, kind: tv}\n"
    (run / "config.yaml").write_text(rest + own)
    assert main(["calibrate", str(run)]) == 2
    assert "no dumped step; train a few with run.dump_steps" in capsys.readouterr().err
    for place in (0, 1):
        torch.save(dump(place, moved=0.01 + place), run / f"dumps/step_1/minibatch{place}_rank0_micro0.pt")
    assert main(["calibrate", str(run), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["masked"]) == 5
    assert all(len(row) == 6 for row in record["masked"])
    shares = [[cell["masked"] for cell in row] for row in record["masked"]]
    assert all(left >= right for row in shares for left, right in itertools.pairwise(row))
    assert shares[0][0] > shares[-1][-1]
    assert math.isclose(record["w_min"], 0.8)
    assert main(["calibrate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "to begin with: method.delta=" in printed
    assert "mismatch of the engines (D where pi is mu" in printed
    assert "Top-K" not in printed
    for place in (0, 1):
        file = run / f"dumps/step_1/minibatch{place}_rank0_micro0.pt"
        torch.save(with_top_k(dump(place), place)[0], file)
    assert main(["calibrate", str(run)]) == 0
    assert "of the sampled tokens are outside the K; everything else has a mass of" in capsys.readouterr().out
    torch.save(
        {**dump(1), "response_mask": torch.zeros(6, 30, dtype=torch.bool)},
        run / "dumps/step_1/minibatch0_rank0_micro0.pt",
    )
    (run / "dumps/step_1/minibatch1_rank0_micro0.pt").write_bytes(b"no")
    assert main(["calibrate", str(run)]) == 2
    assert "minibatch1_rank0_micro0.pt is damaged" in capsys.readouterr().err
    (run / "dumps/step_1/minibatch1_rank0_micro0.pt").unlink()
    assert main(["calibrate", str(run)]) == 2
    assert "no token in the loss" in capsys.readouterr().err
