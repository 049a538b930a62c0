"""Functions timed in turn, so that whatever else the machine does meets all of them alike. Standard library only."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Effort(NamedTuple):
    """How long one cell is measured."""

    rounds: int
    """At most so many rounds of one call of each function ..."""
    seconds: float
    """... begun within so many seconds ..."""
    at_least: int = 5
    """... but never fewer than this."""


def interleaved(
    functions: Mapping[str, Callable[[], object]], effort: Effort, wait: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every call by name, round by round in a random order; a first call of each is not counted.

    Args:
        wait: returns when an accelerator has done what a call left it; its time is the call's.
    """
    for function in functions.values():
        function()
    wait()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, names = random.Random(0), list(functions)
    deadline = time.perf_counter() + effort.seconds
    gc.collect()
    gc.disable()
    try:
        for number in range(effort.rounds):
            if number >= effort.at_least and time.perf_counter() > deadline:
                break
            for name in order.sample(names, len(names)):
                started = time.perf_counter()
                result = functions[name]()
                wait()
                seconds[name].append(time.perf_counter() - started)
                del result  # its memory is given back outside the next call's time
    finally:
        gc.enable()
    return seconds
