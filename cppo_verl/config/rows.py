"""Every row of a data file: chat messages, a data source and a gold answer, looked at column by column."""

from collections.abc import Iterable, Iterator
from typing import Any

_SHOWN = 3  # rows that are named


def inspect_rows(schema: Any, batches: Iterable[Any], prompt_key: str) -> str | None:
    """What is wrong with some rows of pyarrow's record batches that have verl's columns, or None.

    Raises:
        ArrowException, OSError: the file that they come from cannot be read to its end.
    """
    if problem := _columns(schema, prompt_key):
        return problem
    found: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    start = 0
    for batch in batches:
        for what, bad in _bad_rows(batch, prompt_key):
            places = bad.to_numpy(zero_copy_only=False).nonzero()[0]
            counts[what] = counts.get(what, 0) + len(places)
            first = found.setdefault(what, [])
            first += [start + int(place) + 1 for place in places[: _SHOWN - len(first)]]
        start += batch.num_rows
    named = (f"{what} in {_rows(found[what], count, start)}" for what, count in counts.items() if count)
    return "; ".join(named) or None


def _columns(schema: Any, prompt_key: str) -> str | None:
    """The types of the columns, which all rows share."""
    import pyarrow as pa

    prompt, reward = schema.field(prompt_key).type, schema.field("reward_model").type
    listed = pa.types.is_list(prompt) or pa.types.is_large_list(prompt)
    message = prompt.value_type if listed else None
    if message is None or not pa.types.is_struct(message) or message.get_field_index("content") < 0:
        return f"has a {prompt_key} that is not a list of chat messages with role and content"
    if not pa.types.is_struct(reward) or reward.get_field_index("ground_truth") < 0:
        return "has a reward_model without ground_truth"
    return None


def _bad_rows(batch: Any, prompt_key: str) -> Iterator[tuple[str, Any]]:
    """(what is wrong, one boolean a row)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as compute

    prompt = batch.column(prompt_key)
    lengths = compute.fill_null(compute.list_value_length(prompt), 0)
    yield f"has no {prompt_key}", compute.equal(lengths, 0)
    parents = compute.list_parent_indices(prompt)
    messages = compute.list_flatten(prompt)
    lacking = compute.is_null(compute.struct_field(messages, "content"))
    flags = np.zeros(batch.num_rows, dtype=bool)
    flags[compute.filter(parents, lacking).to_numpy(zero_copy_only=False)] = True
    yield f"has a message without content in its {prompt_key}", pa.array(flags)
    yield "has no data_source", compute.is_null(batch.column("data_source"))
    gold = compute.struct_field(batch.column("reward_model"), "ground_truth")
    yield "has no reward_model.ground_truth", compute.is_null(gold, nan_is_null=True)


def _rows(first: list[int], count: int, total: int) -> str:
    if count == 1:
        return f"row {first[0]} of {total}"
    listed = f"{', '.join(map(str, first[:-1]))} and {first[-1]}"
    return f"rows {listed} of {total}" if count <= _SHOWN else f"{count} of {total} rows, the first are {listed}"
