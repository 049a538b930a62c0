"""What ``cppo bench --costs`` measured, as Markdown."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cppo_verl.bench.cells import LENGTHS, RESPONSES, Cell
from cppo_verl.bench.figures import paired_ratio
from cppo_verl.config.compose import compose

# Assumed, not measured: a step of Qwen3-30B-A3B with responses of full length on 128 GPUs, in nodes of eight.
_STEP_SECONDS, _GPUS, _GPUS_A_NODE = 600, 128, 8


def markdown(records: Sequence[Cell]) -> str:
    """One table for each part, and the queue's share of a large step."""
    by_part: dict[str, list[Cell]] = {}
    for record in records:
        by_part.setdefault(record["part"], []).append(record)
    sections = []
    for part, table in _TABLES:
        if part in by_part:
            sections.append(table(by_part[part]))
    if "queue" in by_part:
        sections += [_queue(by_part["queue"]), _share(by_part["queue"])]
    return "\n\n".join([*sections, _circumstances(records)]) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, *rows]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(header), *body])


def _mask(records: list[Cell]) -> str:
    def cell(record: Cell) -> str:
        return f"{_ratio(record, 'mask', 'read'):.0f} ({_nanoseconds(record, 'mask', 1)} ns)"

    return "Mask with causes / reading its inputs once (nanoseconds a token):\n\n" + _by_size(records, cell)


def _quantile(records: list[Cell]) -> str:
    def cell(record: Cell) -> str:
        read, sort = (_ratio(record, "quantile", name) for name in ("read", "sort"))
        return f"{read:.0f}, {sort:.2f} ({_nanoseconds(record, 'quantile', 0)} ns)"

    text = "Calibrated budget / reading its inputs once, / sorting them (nanoseconds a token):\n\n"
    return text + _by_size(records, cell)


def _by_size(records: list[Cell], cell: Any) -> str:
    found = {(record["responses"], record["tokens"]): cell(record) for record in records}
    rows = [[f"{count:,}", *(found.get((count, length), "-") for length in LENGTHS)] for count in RESPONSES]
    return _table(["responses", *(f"{length:,} tokens each" for length in LENGTHS)], rows)


def _gather(records: list[Cell]) -> str:
    names = ("log_softmax", "log_softmax and backward", "hook", "copy")
    rows = []
    for record in records:
        times = [_milliseconds(_median(record, name)) for name in names]
        ratios = [_with_interval(record, "hook", name) for name in names[:2]]
        rows.append([record["dtype"], f"{record['tokens']:,}", *times, *ratios])
    header = ["logits", "tokens", "forward, ms", "and backward, ms", "hook, ms", "copy alone, ms"]
    text = "Top-K gather at a vocabulary of 151,936, K = 20, against verl's log-probability of the sampled token:\n\n"
    return text + _table([*header, "hook / forward", "hook / forward and backward"], rows)


def _log_prob(records: list[Cell]) -> str:
    passes = ("", " and backward")
    rows = []
    for record in records:
        timed = [f"{side}{suffix}" for suffix in passes for side in ("verl's", "ours")]
        timed.append("ours with entropy and backward")
        times = [_milliseconds(_median(record, name)) for name in timed]
        ratios = [_with_interval(record, f"ours{suffix}", f"verl's{suffix}") for suffix in passes]
        sizes = [f"{record['bytes'][name] / 1e6:,.0f}" for name in timed[2:]]
        rows.append([record["dtype"], f"{record['tokens']:,}", *times, *ratios, *sizes])
    header = ["logits", "tokens", "forward, ms: verl's", "ours", "and backward: verl's", "ours", "ours with entropy"]
    header += ["ours / verl's, forward", "and backward", "MB beyond the logits: verl's", "ours", "ours with entropy"]
    text = "Log-probability of the sampled token at a vocabulary of 151,936, without flash-attn's kernel:\n\n"
    return text + _table(header, rows)


def _rollout(records: list[Cell]) -> str:
    names = ("none", "K=0", "K=1", "K=20", "K=64", "vLLM's K=20")
    rows = []
    for record in records:
        tokens = record["responses"] * record["tokens"]
        times = [_a_token(_median(record, name) / tokens) if name in record["seconds"] else "-" for name in names]
        ratios = [_with_interval(record, name, "K=0") for name in ("K=20", "vLLM's K=20")]
        rows.append([f"{record['vocabulary']:,}", *times, *ratios])
    text = (
        f"Rollout in a bare vLLM engine, {records[0]['responses']} responses of {records[0]['tokens']} tokens, "
        "milliseconds a token:\n\n"
    )
    return text + _table(["vocabulary", *names, "K=20 / K=0", "vLLM's K=20 / K=0"], rows)


def _update(records: list[Cell]) -> str:
    rows = []
    for record in records:
        times = [_milliseconds(_median(record, name)) for name in ("ours", "stock")]
        sizes = [f"{record['bytes'][name] / 2**30:.2f}" for name in ("ours", "stock")]
        tokens = f"{record['responses']} x {record['tokens']:,}"
        rows.append([record["shape"], tokens, *times, _with_interval(record, "ours", "stock"), *sizes])
    header = ["shape", "responses x tokens", "ours, ms", "stock GRPO, ms", "ours / stock"]
    text = "Update of a minibatch in verl's FSDP2 engine, K = 20, random weights, without flash-attn:\n\n"
    return text + _table([*header, "GiB at the peak beyond what stays: ours", "stock"], rows)


def _signal(records: list[Cell]) -> str:
    rows = []
    for record in sorted(records, key=lambda record: record["share"]):
        times = [_milliseconds(_median(record, name)) for name in ("ours", "all rows", "stock")]
        rows.append(
            [f"{record['share']:.0%}", *times, *(_with_interval(record, "ours", n) for n in ("all rows", "stock"))]
        )
    header = ["responses without a signal", "ours, ms", "ours with all rows, ms", "stock GRPO, ms"]
    text = "Update of a minibatch of 64 responses of 64 tokens in four micro-batches, the quickstart's model:\n\n"
    return text + _table([*header, "ours / all rows", "ours / stock"], rows)


def _queue(records: list[Cell]) -> str:
    rows = []
    for record in records:
        tokens = record["responses"] * record["tokens"]
        times = [
            f"{_median(record, f'{action} {kind}') / tokens * 1e6:.2f}"
            for action in ("put", "get")
            for kind in ("without", "top-k")
        ]
        size = [f"{record['bytes'][kind] / tokens:.1f}" for kind in ("without", "top-k")]
        rows.append([record["log_prob_dtype"], f"{record['tokens']:,}", *size, *times, f"{_extra(record) * 1e6:.2f}"])
    header = ["log-probs", "tokens a response", "bytes a token without", "with", "put without, µs a token", "with"]
    text = "TransferQueue, 16 responses, K = 20, one client and one storage unit:\n\n"
    return text + _table([*header, "get without", "with", "put and get, more"], rows)


def _share(records: list[Cell]) -> str:
    record = max((line for line in records if line["log_prob_dtype"] == "float32"), key=lambda line: line["tokens"])
    config = compose(["recipe=qwen3_30b_a3b_base"])
    prompts, samples = config.data.train_batch_size, config.actor_rollout_ref.rollout.n
    tokens = prompts * samples * config.data.max_response_length
    size = (record["bytes"]["top-k"] - record["bytes"]["without"]) / (record["responses"] * record["tokens"])
    seconds, nodes = _extra(record) * tokens, _GPUS // _GPUS_A_NODE
    return (
        f"Worked out for Qwen3-30B-A3B (`configs/recipe/qwen3_30b_a3b_base.yaml`): {prompts} x {samples} responses of "
        f"the full {config.data.max_response_length:,} tokens are {tokens / 1e6:.1f} million tokens a step and "
        f"{size * tokens / 1e9:.1f} GB of Top-K columns. One client and one storage unit at the rate above would put "
        f"and get them in {seconds:.0f} s, {seconds / _STEP_SECONDS:.1%} of a step of {_STEP_SECONDS} s; {nodes} nodes "
        f"({_GPUS} GPUs) at once in {seconds / nodes:.1f} s, {seconds / nodes / _STEP_SECONDS:.2%}. Assumed, not "
        f"measured: the {_STEP_SECONDS} s, that the work divides evenly over nodes, and a network as fast as this "
        "machine's memory."
    )


def _circumstances(records: Sequence[Cell]) -> str:
    loads = [record["load"] for record in records]
    threads, dates = ({str(record[name]) for record in records} for name in ("threads", "date"))
    rounds = [len(next(iter(record["seconds"].values()))) for record in records]
    cards = "".join(f"{name}; " for name in sorted({record["gpu"] for record in records if "gpu" in record}))
    return (
        f"{', '.join(sorted(dates))}; {cards}{', '.join(sorted(threads))} thread(s); "
        f"{min(rounds)} to {max(rounds)} rounds; load average before a cell {min(loads)} to {max(loads)}."
    )


def _median(record: Cell, name: str) -> float:
    return float(np.median(record["seconds"][name]))


def _ratio(record: Cell, ours: str, other: str) -> float:
    return paired_ratio(record["seconds"][ours], record["seconds"][other]).median


def _with_interval(record: Cell, ours: str, other: str) -> str:
    ratio = paired_ratio(record["seconds"][ours], record["seconds"][other])
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _a_token(seconds: float) -> str:
    """Milliseconds, with at least three digits that count."""
    return f"{seconds * 1e3:.3f}" if seconds >= 1e-4 else f"{seconds * 1e3:.3g}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _nanoseconds(record: Cell, name: str, decimals: int) -> str:
    """Of a token; below one two digits that count."""
    value = _median(record, name) / (record["responses"] * record["tokens"]) * 1e9
    return f"{value:.{decimals}f}" if value >= 1 else f"{value:.2g}"


def _extra(record: Cell) -> float:
    """Seconds a token that the Top-K columns add to a put and a get: the median over rounds."""
    seconds = {name: np.array(values) for name, values in record["seconds"].items()}
    more = seconds["put top-k"] + seconds["get top-k"] - seconds["put without"] - seconds["get without"]
    return float(np.median(more)) / (record["responses"] * record["tokens"])


_TABLES = (
    *(("mask", _mask), ("quantile", _quantile), ("gather", _gather), ("log_prob", _log_prob)),
    *(("update", _update), ("rollout", _rollout), ("signal", _signal)),
)
