"""Hostile answers in a crowd, wherever the grader runs: ``python pressure.py`` prints what happened as JSON."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from cppo_verl.grading import grade, pool

HANGS = r"\boxed{\binom{1000000000}{500000000}}"  # one long call into big-integer code, past every cap
NEEDS_ALGEBRA = r"\boxed{2 \cdot 17}"
TIMEOUT = 1.0

HOSTILE = {
    "tower": r"\boxed{9^{9^9}}",
    "power": r"\boxed{2^{10^9}}",
    "factorial": r"\boxed{999999999!}",
    "factorial tower": r"\boxed{((99)!)!}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 60 + "1" + "}" * 61,
    "braces": r"\boxed{" + "{" * 5000 + "}" * 5001,
    "parentheses in the box": r"\boxed{" + r"\( " * 16_000 + "}",
    "parentheses before the box": r"\( " * 16_000 + r"\boxed{35}",
    "dollars": r"\boxed{" + "$ " * 150 + "}",
    "polynomial": r"\boxed{(x+1)^{500}(x-1)^{500}}",
    "trig product": r"\boxed{\sin(1)^{99}\cos(2)^{99}\tan(3)^{99}}",
    "powers in brackets": r"\boxed{((((10^{9999})^{9999})^{9999})^{9999})}",
    "binomial": HANGS,
    "garbage": r"\boxed{" + "".join(map(chr, range(256))).replace("{", "").replace("}", "") + "\ud800}",
    "bytes": b"\\boxed{34}",
    "nothing": None,
}


def pressure():
    """Everything that a busy reward worker can meet, on the pool of this process."""
    seconds, outcomes = {}, {}
    for name, response in HOSTILE.items():
        grade(NEEDS_ALGEBRA, "34")  # a worker is up: the limit counts from the start of execution
        started = time.monotonic()
        outcomes[name] = grade(response, "34", timeout=TIMEOUT).outcome
        seconds[name] = time.monotonic() - started
    with ThreadPoolExecutor(24) as threads:
        hanging = [threads.submit(grade, HANGS, "34", timeout=TIMEOUT) for _ in range(16)]
        innocent = [threads.submit(grade, NEEDS_ALGEBRA, "34", timeout=4.0) for _ in range(8)]
        crowd = {
            "innocent": [job.result().outcome for job in innocent],
            "hanging": [job.result().outcome for job in hanging],
        }
    killed = [worker._process.pid for worker in pool._pool._workers]
    for process in killed:
        os.kill(process, signal.SIGKILL)
    after = [grade(NEEDS_ALGEBRA, "34").outcome for _ in range(pool.MAX_WORKERS + 1)]
    return {"seconds": seconds, "outcomes": outcomes, **crowd, "killed": len(killed), "after": after}


def assert_unharmed(result):
    slow = {name: seconds for name, seconds in result["seconds"].items() if seconds > TIMEOUT + 1.0}
    assert slow == {}
    assert "right" not in result["outcomes"].values()
    assert result["outcomes"]["binomial"] == "timeout"
    assert result["innocent"] == ["right"] * 8
    assert result["hanging"] == ["timeout"] * 16
    assert result["killed"] > 0
    assert set(result["after"]) == {"right"}


if __name__ == "__main__":
    print(json.dumps(pressure()))
