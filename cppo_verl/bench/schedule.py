"""``cppo bench --schedule``: what generation that does not wait for training gains, by a discrete-event simulation.

Servers decode by continuous batching: with b responses under way a token of each takes ``base + per_response * b``
seconds, so that a batch's longest response decides when lockstep may go on. Phase times are published ones of verl's on
H20 cards; what is predicted from them is set beside verl's published steps (docs/async.md, "What it would gain").
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import linear_regression
from typing import NamedTuple

from rich.table import Table

from cppo_verl.run.terminal import console, say

SEQUENCES = 256  # of a server at a time, the others queue
STEPS, FIRST = 12, 4  # simulated; those before FIRST fill the pipeline and are left out


class Published(NamedTuple):
    """verl's docs/advance/fully_async.md (10/18/2025): Qwen2.5-Math-7B, 512 prompts x 16 responses up to 28K tokens."""

    sync_step: float
    sync_gen: float
    old_log_prob: float
    sync_update: float
    async_step: float
    async_update: float
    """With half of the cards; the other half generates."""
    gain: str
    """Of total times after 100, 200, 300 and 400 steps, least and most."""


PUBLISHED = {
    32: Published(790.10, 357.41, 107.71, 313.81, 294.77, 269.80, "1.70-2.66"),
    64: Published(365.28, 150.72, 70.26, 133.41, 189.26, 156.98, "1.83-2.09"),
    128: Published(356.30, 177.85, 53.92, 113.81, 150.63, 113.16, "2.35-2.67"),
}


@dataclass(frozen=True)
class Load:
    """A step's work, and how long its parts take."""

    prompts: int = 512
    n: int = 16
    longest: int = 28_672
    mean: float = 4000.0
    """Tokens of a response; lognormal, cut at ``longest``. Not published: assumed."""
    spread: float = 1.0
    """Standard deviation of the logarithm; assumed."""
    base: float = 5.3e-3
    """Seconds of a token on an empty server; about the published generation on 64 cards by the longest's tokens."""
    per_response: float = 5e-5
    """Seconds that each response under way adds to a token."""
    sync_seconds: float = 5.0
    """Weights to the servers; assumed."""

    def length(self, draw: random.Random) -> float:
        log = draw.gauss(math.log(self.mean) - self.spread**2 / 2, self.spread)
        return min(max(1.0, math.exp(log)), self.longest)


def inverse_fit(points: dict[int, float]) -> Callable[[int], float]:
    """``c / cards + d`` by least squares, d no less than 0: the seconds of a phase on any number of cards."""
    slope, rest = linear_regression([1 / cards for cards in points], list(points.values()))
    return lambda cards: slope / cards + max(0.0, rest)


@dataclass
class _Server:
    load: Load
    clock: float = 0.0
    tokens: float = 0.0  # that a response under way since the beginning would have
    active: list[tuple[float, int]] = field(default_factory=list)  # (tokens at its end, group)
    waiting: deque[tuple[float, int]] = field(default_factory=deque)

    def _token(self) -> float:
        return self.load.base + self.load.per_response * len(self.active)

    def advance(self, now: float) -> None:
        if self.active:
            self.tokens += (now - self.clock) / self._token()
        self.clock = now

    def next_end(self) -> float:
        return self.clock + (self.active[0][0] - self.tokens) * self._token() if self.active else math.inf

    def add(self, length: float, group: int) -> None:
        if len(self.active) < SEQUENCES:
            heapq.heappush(self.active, (self.tokens + length, group))
        else:
            self.waiting.append((length, group))

    def finish(self) -> int:
        self.tokens, group = heapq.heappop(self.active)
        if self.waiting:
            self.add(*self.waiting.popleft())
        return group


class Rollout:
    """All servers of a run, the groups that they generate and those that are finished."""

    def __init__(self, load: Load, servers: int, seed: int) -> None:
        self.load, self.draw, self.now, self.version = load, random.Random(seed), 0.0, 0
        self.servers = [_Server(load) for _ in range(servers)]
        self.left: dict[int, int] = {}
        self.born: dict[int, int] = {}
        self.finished: deque[int] = deque()

    def submit(self, groups: int) -> None:
        """Each response to the server that has the fewest."""
        heap = [(len(server.active) + len(server.waiting), place) for place, server in enumerate(self.servers)]
        heapq.heapify(heap)
        for _ in range(groups):
            group = len(self.born)
            self.left[group], self.born[group] = self.load.n, self.version
            for _ in range(self.load.n):
                count, place = heapq.heappop(heap)
                self.servers[place].add(self.load.length(self.draw), group)
                heapq.heappush(heap, (count + 1, place))

    def run(self, until: float = math.inf, wanted: int | None = None) -> None:
        """Generate until a moment, or until so many groups lie finished."""
        for server in self.servers:
            server.advance(self.now)
        ends = [(server.next_end(), place) for place, server in enumerate(self.servers)]
        heapq.heapify(ends)
        while ends and ends[0][0] <= until and (wanted is None or len(self.finished) < wanted):
            self.now, place = heapq.heappop(ends)
            if self.now == math.inf:
                raise RuntimeError("nothing is generated, and more is waited for")
            server = self.servers[place]
            server.advance(self.now)
            group = server.finish()
            self.left[group] -= 1
            if not self.left[group]:
                self.finished.append(group)
            heapq.heappush(ends, (server.next_end(), place))
        if wanted is None:
            self.now = until
        for server in self.servers:
            server.advance(self.now)

    def pause(self, seconds: float) -> None:
        """Nothing is generated; what is under way goes on afterwards."""
        self.now += seconds
        for server in self.servers:
            server.clock = self.now

    def take(self, groups: int) -> list[int]:
        """Ages, in weight updates, of the groups that are trained."""
        return [self.version - self.born[self.finished.popleft()] for _ in range(groups)]


class Step(NamedTuple):
    seconds: float
    waited: float
    """Seconds in which nothing was trained for want of responses."""
    age: float
    """Mean over groups."""


def simulate(load: Load, mode: str, servers: int, update: float, ahead: int = 1, parts: int = 4, seed: int = 0) -> Step:
    """The mean step of a mode.

    Args:
        mode: as ``mode=``; in separate_async ``servers`` are all that generate, else all cards.
        update: seconds of a step's updates, and of whatever else is done before them.
        ahead: batches that are submitted before the first step, in the asynchronous modes.
        parts: updates of a step, each on its own part of the batch, in separate_async.
    """
    rollout = Rollout(load, servers, seed)
    if mode != "sync":
        rollout.submit(ahead * load.prompts)
    rows = list(_steps(rollout, load, mode, update, parts))[FIRST:]
    return Step(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def _steps(rollout: Rollout, load: Load, mode: str, update: float, parts: int) -> Iterator[Step]:
    for _ in range(STEPS):
        began, waited, ages = rollout.now, 0.0, []
        rollout.submit(load.prompts)
        for _ in range(parts if mode == "separate_async" else 1):
            groups = load.prompts // parts if mode == "separate_async" else load.prompts
            before = rollout.now
            rollout.run(wanted=groups)
            waited += rollout.now - before
            ages += rollout.take(groups)
            if mode == "separate_async":
                rollout.run(until=rollout.now + update / parts)
            else:
                rollout.pause(update)
        rollout.pause(load.sync_seconds)
        rollout.version += 1
        yield Step(rollout.now - began, waited, sum(ages) / len(ages))


def calibrated() -> Load:
    """``per_response`` such that lockstep on 32 cards generates as long as published, by bisection."""
    low, high = 0.0, 1e-3
    for _ in range(24):
        middle = (low + high) / 2
        load = Load(per_response=middle)
        waited = simulate(load, "sync", 32, 0.0).waited
        low, high = (middle, high) if waited < PUBLISHED[32].sync_gen else (low, middle)
    return Load(per_response=high)


def schedule() -> int:
    """Print the predictions beside what is published; returns the exit status."""
    load = calibrated()
    lockstep = inverse_fit({cards: row.sync_update for cards, row in PUBLISHED.items()})
    old = inverse_fit({cards: row.old_log_prob for cards, row in PUBLISHED.items()})
    apart = inverse_fit({cards // 2: row.async_update for cards, row in PUBLISHED.items()})
    table = Table(
        "cards", "mode", "step, s", "waited, s", "mean age", "gain", "published step", "its gain", "of total times"
    )
    for cards in (8, 32, 64, 128, 512):
        row = PUBLISHED.get(cards)
        sync = simulate(load, "sync", cards, lockstep(cards))
        with_old = sync.seconds + old(cards)
        shown = [
            ("verl in lockstep (recomputes old log-probabilities)", Step(with_old, sync.waited, 0)),
            ("mode=sync", sync),
            ("mode=colocate_async", simulate(load, "colocate_async", cards, lockstep(cards))),
            ("mode=separate_async, half and half", simulate(load, "separate_async", cards // 2, apart(cards // 2))),
        ]
        published: list[list[str]] = [[], [], [], []]
        if row:
            published[0] = [f"{row.sync_step:.0f}", "1.00"]
            published[3] = [f"{row.async_step:.0f}", f"{row.sync_step / row.async_step:.2f}", row.gain]
        for (name, step), cells in zip(shown, published, strict=True):
            numbers = (f"{step.seconds:.0f}", f"{step.waited:.0f}", f"{step.age:.2f}", f"{with_old / step.seconds:.2f}")
            table.add_row(str(cards), name, *numbers, *cells)
        table.add_section()
    console(width=150).print(table)
    say(
        f"Fitted: {load.per_response * 1e6:.1f} us a token for each response under way, to the published generation on "
        f"32 cards in lockstep; phase times c/cards + d to the published ones. Assumed: responses of {load.mean:.0f} "
        f"tokens in the mean (lognormal, {load.spread:g}, cut at {load.longest}), {load.sync_seconds:g} s a sync."
    )
    return 0
