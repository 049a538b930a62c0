"""One rank of divided logits: ``parallel.py LAYOUT...``, ulysses or TPxCP as in 2x1 (RANK, WORLD_SIZE set)."""

import sys

import torch
from topk_cases import VOCABULARY, expected_log_probs, micro_batch, nested

from cppo_verl.adapters.actor.topk import TopKLogits

LENGTHS = [5, 1, 9, 3, 7]


def by_ulysses(logits):
    from verl.utils.ulysses import set_ulysses_sequence_parallel_group, slice_input_tensor

    set_ulysses_sequence_parallel_group(torch.distributed.group.WORLD)
    yield slice_input_tensor(logits.unsqueeze(0), dim=1), None, None
    temperature = torch.linspace(0.5, 2, len(logits))
    scaled = slice_input_tensor((logits * temperature[:, None]).unsqueeze(0), dim=1)
    # verl pads the last rank's slice with temperatures of 1.
    yield scaled, None, slice_input_tensor(temperature[None], dim=1)[0].clamp_min(1e-8)
    set_ulysses_sequence_parallel_group(None)


def by_megatron(logits, data, tensor_parallel, context_parallel):
    """The logits as Megatron's last stage would hold them: positions by verl's layout, ids by equal shards."""
    from megatron.core import parallel_state
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
    from verl.utils import tensordict_utils as tu

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, context_parallel_size=context_parallel
    )
    lengths = data["input_ids"].offsets().diff().tolist()
    rows = nested(list(logits.split(lengths)))
    shard = VOCABULARY // tensor_parallel
    first = parallel_state.get_tensor_model_parallel_rank() * shard
    mine = slice(first, first + shard)
    yield preprocess_thd_engine(rows, pre_process=True)[0][..., mine], "thd", None
    yield preprocess_bshd_engine(rows, pre_process=True)[0][..., mine], "bshd", None
    # verl's default: every micro-batch as wide as the longest sequence of its minibatch.
    tu.assign_non_tensor(data, forced_max_seqlen=33)
    yield preprocess_bshd_engine(rows, pre_process=True, forced_max_seqlen=33)[0][..., mine], "bshd", None
    parallel_state.destroy_model_parallel()


def check(layout):
    data, logits, log_pi, log_mu, valid = micro_batch(LENGTHS)
    expected = expected_log_probs(data, logits)
    divided = by_ulysses(logits) if layout == "ulysses" else by_megatron(logits, data, *map(int, layout.split("x")))
    for local, data_format, temperature in divided:
        collector = TopKLogits()
        collector.collect(local, data, data_format, temperature)
        topk = collector.finish(log_pi, log_mu, valid, data)
        errors = [
            (topk.topk_log_prob[row, : len(rows)].double() - torch.tensor(rows).double()).abs().max().item()
            for row, rows in enumerate(expected)
        ]
        assert max(errors) < 1e-5, (layout, data_format, errors)
        print(f"{layout} {data_format or ''}: equal to the single process within {max(errors):.1e}")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for layout in sys.argv[1:]:
        check(layout)
    torch.distributed.destroy_process_group()
