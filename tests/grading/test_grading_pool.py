"""The workers: time limits, crowds, deaths, forks and orphans. None of it may turn a right answer into a zero."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cppo_verl.grading import grade, pool

HANGS = r"\boxed{\binom{1000000000}{500000000}}"  # one long call into big-integer code, past every cap
NEEDS_ALGEBRA = r"\boxed{2 \cdot 17}"
QUESTION = {"gold": "34", "sides": [("2 \\cdot 17", False)]}

BOMBS = {
    "tower": "9^{9^9}",
    "power": "2^{10^9}",
    "factorial": "999999999!",
    "factorial tower": "((99)!)!",
    "nested fractions": r"\frac{1}{" * 60 + "1" + "}" * 60,
    "braces": "{" * 5000 + "}" * 5000,
    "parentheses": r"\( " * 3000,
    "dollars": "$ " * 150,
    "polynomial": "(x+1)^{500}(x-1)^{500}",
    "trig product": r"\sin(1)^{99}\cos(2)^{99}\tan(3)^{99}",
    "powers in brackets": "((((10^{9999})^{9999})^{9999})^{9999})",
    "binomial": r"\binom{1000000000}{500000000}",
}


@pytest.mark.parametrize("answer", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_ends_within_the_limit_and_scores_nothing(answer):
    grade(NEEDS_ALGEBRA, "34")  # a worker is up: starting one is not part of the limit
    started = time.monotonic()
    assert grade(f"\\boxed{{{answer}}}", "34", timeout=1.0).outcome != "right"
    assert time.monotonic() - started < 2.0


def test_right_answers_behind_hanging_ones_stay_right():
    with ThreadPoolExecutor(16) as threads:
        hanging = [threads.submit(grade, HANGS, "34", timeout=0.5) for _ in range(3 * pool.MAX_WORKERS)]
        innocent = [threads.submit(grade, NEEDS_ALGEBRA, "34", timeout=2.0) for _ in range(8)]
        assert [job.result().outcome for job in innocent] == ["right"] * 8
        assert {job.result().outcome for job in hanging} == {"timeout"}


def test_replies_are_not_mixed_up_between_threads():
    golds = [str(n) for n in range(60)]
    with ThreadPoolExecutor(8) as threads:
        outcomes = threads.map(lambda gold: grade(rf"\boxed{{{gold} + 0}}", gold).outcome, golds)
        off_by_one = threads.map(lambda gold: grade(rf"\boxed{{{gold} + 1}}", gold).outcome, golds)
        assert set(outcomes) == {"right"}
        assert set(off_by_one) == {"wrong"}


@pytest.fixture
def workers():
    own = pool.WorkerPool(1)
    yield own
    own.close()


def _pids(own):
    return [worker._process.pid for worker in own._workers]


def test_a_worker_killed_between_questions_is_replaced(workers):
    assert workers.ask(QUESTION, 5.0) == {"right": True}
    (first,) = _pids(workers)
    os.kill(first, signal.SIGKILL)
    assert workers.ask(QUESTION, 5.0) == {"right": True}
    assert _pids(workers) != [first]


def test_a_worker_over_time_is_killed_and_the_next_question_answered(workers):
    workers.ask(QUESTION, 5.0)
    (first,) = _pids(workers)
    with pytest.raises(pool.WorkerTimeout):
        workers.ask({"gold": "34", "sides": [(r"\binom{1000000000}{500000000}", False)]}, 0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert workers.ask(QUESTION, 5.0) == {"right": True}


def test_a_worker_that_cannot_start_is_an_error_not_a_wrong_answer(monkeypatch, caplog):
    monkeypatch.setattr(pool, "_pool", pool.WorkerPool(1))
    monkeypatch.setattr(pool.sys, "executable", "/does/not/exist")
    assert grade(NEEDS_ALGEBRA, "34").outcome == "error"
    assert "/does/not/exist" in caplog.text


def test_a_forked_child_does_not_share_the_workers_of_its_parent():
    grade(NEEDS_ALGEBRA, "34")
    before = set(pool._pool._workers)
    child = os.fork()
    if child == 0:
        fine = not pool._pool._workers and grade(NEEDS_ALGEBRA, "34").outcome == "right"
        pool._pool.close()
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert grade(NEEDS_ALGEBRA, "34").outcome == "right"
    assert before & pool._pool._workers


def test_a_busy_worker_does_not_outlive_its_killed_parent():
    code = f"""if True:
        import threading
        from cppo_verl.grading import grade, pool
        grade({NEEDS_ALGEBRA!r}, "34")
        print(*[worker._process.pid for worker in pool._pool._workers], flush=True)
        grade({HANGS!r}, "34", timeout=1.0)
    """
    root = pathlib.Path(pool.__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5.0
    while _running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    survived = _running(worker)
    if survived:  # a failing test must not leave a process that computes for ever
        os.kill(worker, signal.SIGKILL)
    assert not survived


def _running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
