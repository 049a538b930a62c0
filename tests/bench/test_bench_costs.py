"""``cppo bench --costs``: cells, their records and the tables; what is timed is what training runs."""

import json
from pathlib import Path

import pytest
import torch

from cppo_verl.adapters.actor.log_prob import CHUNK
from cppo_verl.bench import cells, costs, tables
from cppo_verl.bench.cells import by_process, grid, memory_limit, record_of, records, too_large
from cppo_verl.bench.measure import tensors
from cppo_verl.bench.timing import Effort, interleaved
from cppo_verl.cli import main
from cppo_verl.run.log import read_lines


def test_every_function_is_called_once_a_round():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, Effort(7, 60.0))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 7, "b": 7}
    assert len(calls) == 16  # one more of each, not counted
    assert all({*calls[at : at + 2]} == {"a", "b"} for at in range(0, 16, 2))
    assert "".join(calls) != "ab" * 8  # not always in the same order
    late = interleaved({"a": lambda: None}, Effort(1000, 0.0, at_least=6))
    assert len(late["a"]) == 6


def test_the_grid_is_that_of_the_documents():
    parts = [cell["part"] for cell in grid(on_gpu=False)]
    assert {part: parts.count(part) for part in parts} == {
        "mask": 16,
        "quantile": 16,
        "gather": 6,
        "log_prob": 2,
        "rollout": 3,
        "signal": 5,
        "queue": 6,
    }
    assert [len(group) for group in by_process(grid(on_gpu=False))] == [40, 1, 1, 1, 5, 6]


def test_cells_beyond_the_memory_are_left_out(monkeypatch):
    large = {"part": "mask", "responses": 4096, "tokens": 65_536}
    assert too_large(large, memory_limit()) == "needs about 30.0 GiB, more than 4.0"
    small = {"part": "mask", "responses": 16, "tokens": 1024}
    assert too_large(small, memory_limit()) is None
    monkeypatch.setattr(cells.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    assert too_large(small, memory_limit()) == "needs about 0.0 GiB, more than 0.0"


def test_a_record_belongs_to_the_cell_with_all_its_sizes():
    cell = {"part": "mask", "responses": 1, "tokens": 64}
    finished = [{**cell, "seconds": 1}, {**cell, "tokens": 65}, {**cell, "seconds": 2}]
    assert record_of(cell, finished) == finished[2]
    assert record_of({**cell, "tokens": 66}, finished) is None


def test_a_finished_cell_is_not_measured_again(monkeypatch, tmp_path, capsys):
    wanted = [{"part": "mask", "responses": 1, "tokens": length} for length in (1024, 4096)]
    wanted.append({"part": "mask", "responses": 4096, "tokens": 65_536})
    asked = []

    def measure_cells(folder, cells, *_):
        asked.append(cells)
        with open(folder / "costs.jsonl", "a") as file:
            for cell in cells:
                seconds = {"mask": [3e-4] * 5, "read": [1e-5] * 5}
                file.write(json.dumps({**cell, "threads": 1, "load": 0.0, "date": "d", "seconds": seconds}) + "\n")
        return 0

    monkeypatch.setattr(costs, "measure_cells", measure_cells)
    monkeypatch.setattr(costs, "grid", lambda on_gpu: wanted[:1])
    assert main(["bench", "--costs", str(tmp_path)]) == 0
    monkeypatch.setattr(costs, "grid", lambda on_gpu: wanted)
    with open(tmp_path / "costs.jsonl", "a") as file:
        file.write('{"part": "mask", "resp')  # cut off by a kill
    assert main(["bench", "--costs", str(tmp_path)]) == 0
    assert asked == [wanted[:1], wanted[1:2]]
    assert len(records(tmp_path)) == 2
    output = capsys.readouterr().out
    assert "left out  mask: 4,096 responses, 65,536 tokens: needs about 30.0 GiB, more than 4.0" in output
    assert "| 1 | 30 (293.0 ns) | 30 (73.2 ns) | - | - |" in output
    assert (tmp_path / "costs.md").read_text() in output


def test_the_queues_share_by_hand():
    """160 bytes and 3 microseconds a token more, 256 x 16 x 16,384 tokens: 10.7 GB and 201 s, a third of 600 s."""
    tokens = 16 * 16_384
    micro = {"put top-k": 4.0, "get top-k": 2.0, "put without": 2.0, "get without": 1.0}
    record = {
        "part": "queue",
        "responses": 16,
        "tokens": 16_384,
        "log_prob_dtype": "float32",
        "bytes": {"top-k": 220 * tokens, "without": 60 * tokens},
        "seconds": {name: [value * 1e-6 * tokens] * 5 for name, value in micro.items()},
    }
    text = tables.markdown([{**record, "threads": 1, "load": 0.5, "date": "2026-11-25"}])
    assert "| float32 | 16,384 | 60.0 | 220.0 | 2.00 | 4.00 | 1.00 | 2.00 | 3.00 |" in text
    assert "67.1 million tokens a step and 10.7 GB" in text
    assert "201 s, 33.6% of a step of 600 s; 16 nodes (128 GPUs) at once in 12.6 s, 2.10%" in text
    assert "Assumed, not measured" in text


def test_the_table_of_updates_is_in_the_order_of_their_shares():
    circumstances = {"threads": 1, "load": 0.5, "date": "2026-11-25"}
    records = [
        {
            "part": "signal",
            "share": share,
            **circumstances,
            "seconds": {"ours": [ours, 1.1 * ours, ours], "all rows": [0.4] * 3, "stock": [0.5] * 3},
        }
        for share, ours in ((1.0, 0.01), (0.5, 0.2))
    ]
    half, none = tables.markdown(records).splitlines()[4:6]
    assert half.startswith("| 50% | 200 | 400 | 500 | 0.500 ")
    assert none.startswith("| 100% | 10 | 400 | 500 | 0.025 ")


def test_the_timed_update_leaves_out_the_share_that_was_asked_for():
    from cppo_verl.adapters.actor.selection import select_rows
    from cppo_verl.bench.measure import engine

    cell = {"part": "signal", "vocabulary": 55, "responses": 8, "tokens": 6, "k": 5, "share": 0.75}
    batch = engine._without_signal(engine._minibatch(cell), cell["share"])
    engine._set_sizes(batch, micro_batch_size=2)
    selected = select_rows(batch, None)
    assert (selected.trained, selected.rows, len(selected.data)) == (2, 8, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_timed_gather_is_the_actors(dtype):
    torch.manual_seed(0)
    functions, _ = tensors.gather({"part": "gather", "vocabulary": 300, "dtype": dtype, "tokens": 9, "k": 5})
    topk = functions["hook"]()
    assert topk.topk_log_prob.shape == (1, 8, 5)
    torch.testing.assert_close(topk.topk_log_prob, topk.rollout_topk_log_prob, atol=1e-5, rtol=0)
    assert topk.sampled_in_topk.tolist() == [[row % 4 != 0 for row in range(8)]]
    assert functions["copy"]().shape == (8, 6)
    assert functions["log_softmax"]().shape == (9,)
    functions["log_softmax and backward"]()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_timed_log_prob_is_the_actors_and_its_bytes_are_counted(dtype):
    cell = {"part": "log_prob", "vocabulary": 20_000, "dtype": dtype, "tokens": 400}
    functions, facts = tensors.log_prob(cell)
    verls, ours = functions["verl's"](), functions["ours"]()
    assert ours.dtype == torch.float32
    difference = (ours - verls.float()).abs().max()
    assert (difference > 1e-3) == (dtype == "bfloat16")
    assert difference < 0.1
    # verl's has the gradient and more beside the logits; ours is the logits' own storage, and chunks that malloc keeps.
    size = 400 * 20_000 * (4 if dtype == "float32" else 2)
    assert facts["bytes"]["verl's and backward"] > 0.9 * size
    assert facts["bytes"]["ours and backward"] < 2.2 * 4 * CHUNK
    seconds = {name: [1e-3, 2e-3, 1e-3] for name in functions}
    text = tables.markdown([{**cell, **facts, "threads": 1, "load": 0.5, "date": "d", "seconds": seconds}])
    assert f"| {dtype} | 400 | 1 | 1 | 1 | 1 | 1 | 1.000 (" in text


def test_the_timed_mask_has_both_causes_and_the_timed_budget_is_calibrated():
    cell = {"responses": 8, "tokens": 256}
    functions, _ = tensors.mask({"part": "mask", **cell})
    region = functions["mask"]()
    assert region.keep.shape == (8, 256)
    assert region.token_exceeded.any()
    assert (region.prefix_exceeded & ~region.token_exceeded).any()
    assert not region.keep.all()
    assert [tensor.dim() for tensor in functions["read"]()] == [0] * 4
    budget = tensors.quantile({"part": "quantile", **cell})[0]["quantile"]()
    assert ((budget >= tensors.DELTA_B) & (budget <= 2 * tensors.DELTA_B)).all()
    assert len(budget.unique()) > 1


def test_the_documents_tables_are_those_of_the_committed_records():
    docs = Path(__file__).parents[2] / "docs"
    for page, pattern in (("benchmarks.md", "costs-*.jsonl"), ("gpu.md", "gpu-*-costs.jsonl")):
        newest, text = max((docs / "results").glob(pattern)), (docs / page).read_text()
        assert tables.markdown(list(read_lines(newest))) in text
        assert f"(results/{newest.name})" in text
