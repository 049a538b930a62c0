"""Rows without a signal: which are left out, that ranks agree, that the gradient is the same to float64 rounding."""

import itertools

import pytest
import torch
from tensordict import TensorDict
from topk_cases import nested
from verl.utils import tensordict_utils as tu
from verl.workers.engine.utils import prepare_micro_batches

from cppo_verl.adapters.actor import selection
from cppo_verl.adapters.actor.selection import select_rows
from cppo_verl.adapters.driver.trajectories import spread


def minibatch(lengths, used, **settings):
    """Rows of ``3 + length`` tokens; ids number the rows."""
    rows = range(len(lengths))
    columns = {
        "input_ids": [torch.full((3 + lengths[row],), row) for row in rows],
        "responses": [torch.full((lengths[row],), row) for row in rows],
        "loss_mask": [torch.full((lengths[row],), int(used[row])) for row in rows],
    }
    data = TensorDict({name: nested(column) for name, column in columns.items()}, batch_size=len(lengths))
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=2, **settings)
    return data


def kept(data):
    return [int(row[0]) for row in data["input_ids"].unbind()]


def test_rows_with_a_token_in_the_loss_stay_in_their_order():
    data = minibatch([3, 5, 2, 4, 6, 1], [1, 0, 0, 1, 1, 0])
    found = select_rows(data, None)
    assert (found.trained, found.rows) == (3, 6)
    # Two micro-batches of two: the shortest of the others fills up.
    assert kept(found.data) == [0, 3, 4, 5]
    assert [kept(batch) for batch in prepare_micro_batches(found.data)[0]] == [[0, 3], [4, 5]]
    assert tu.get(found.data, "global_token_num") == [6, 7, 9, 4]


def test_a_minibatch_that_is_used_whole_is_handed_on_as_it_is():
    data = minibatch([3, 5], [1, 1])
    assert select_rows(data, None).data is data


def test_without_any_signal_there_is_nothing_to_train():
    assert select_rows(minibatch([3, 5], [0, 0]), None) == (None, 0, 2)


@pytest.mark.parametrize("micro", [1, 2, 4, 8, "dynamic"])
def test_ranks_run_as_many_micro_batches_as_the_busiest(micro, monkeypatch):
    """Every share of two ranks' eight rows; each micro-batch at most as large as before."""
    lengths = [2, 9, 4, 7, 1, 6, 3, 8]
    for ours, others in itertools.product(range(9), repeat=2):
        counts = []
        for mine, other in ((ours, others), (others, ours)):
            sizes = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 20} if micro == "dynamic" else {}
            data = minibatch(lengths, [place < mine for place in range(8)])
            tu.assign_non_tensor(data, **(sizes or {"micro_batch_size_per_gpu": micro}))
            peer = minibatch(lengths, [place < other for place in range(8)])
            tu.assign_non_tensor(peer, **(sizes or {"micro_batch_size_per_gpu": micro}))
            rows = torch.tensor(lengths) + 3
            most = max(selection._micro_batches(half, rows[:used]) for half, used in ((data, mine), (peer, other)))
            monkeypatch.setattr(selection, "_agree", lambda *_, most=most, sum=mine + other: (most, sum, 16))
            found = select_rows(data, None).data
            if mine + other == 0:
                assert found is None
                continue
            assert set(range(mine)) <= set(kept(found))
            if micro == "dynamic":
                assert len(found) >= most
                assert len(found) == max(mine, most)
            else:
                batches = prepare_micro_batches(found)[0]
                counts.append(len(batches))
                assert max(map(len, batches)) <= micro
                assert len(found) < mine + most or mine == 0
        if counts:
            assert counts[0] == counts[1]


def test_the_gradient_is_the_same_to_float64_rounding():
    """A small float64 model; per-token losses reduced as the actor reduces them, in micro-batches of what is left."""
    from verl.trainer.ppo.core_algos import agg_loss

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (12,), generator=generator).tolist()
    used = [place % 3 != 1 for place in range(12)]
    tables = torch.randn(12, 30, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = sum(length for length, use in zip(lengths, used, strict=True) if use)

    def gradient(data, mode):
        total = 0
        for batch in prepare_micro_batches(data)[0]:
            mask = batch["loss_mask"].to_padded_tensor(0).bool()
            losses = torch.stack([(tables[row, : mask.shape[1]] @ weight).tanh() for row in kept(batch)])
            total = total + agg_loss(
                loss_mat=losses,
                loss_mask=mask,
                loss_agg_mode=mode,
                dp_size=1,
                batch_num_tokens=tokens,
                global_batch_size=12,
                loss_scale_factor=30,
            )
        return torch.autograd.grad(total, weight)[0]

    for mode in ("seq-mean-token-sum-norm", "token-mean", "seq-mean-token-sum"):
        whole = minibatch(lengths, used)
        part = select_rows(minibatch(lengths, used), None).data
        assert len(part) == 8
        torch.testing.assert_close(gradient(part, mode), gradient(whole, mode), rtol=0, atol=1e-12)


def test_spread_rows_share_the_work_and_stay_in_their_minibatch():
    """Two ranks, two minibatches of four rows each; all used rows lay on the first rank."""
    used = [True, True, True, True, False, False, False, False]
    lengths = [10, 1, 2, 9, 5, 5, 5, 5]
    order = spread(used, lengths, ranks=2, minibatches=2)
    assert sorted(order) == list(range(8))
    minibatches = [{*order[0:2], *order[4:6]}, {*order[2:4], *order[6:8]}]
    assert minibatches == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    for rank in (order[:4], order[4:]):
        assert [used[row] for row in rank].count(True) == 2
    assert spread([True] * 4, [1, 1, 1, 1], ranks=1, minibatches=2) == [0, 1, 2, 3]
