"""The workers: time limits, crowds, deaths, forks and orphans. None of it may turn a right answer into a zero."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pressure import HANGS, NEEDS_ALGEBRA, assert_unharmed, pressure

from cppo_verl.grading import grade, pool

pytestmark = pytest.mark.alone  # time limits of a second, kept while 24 threads ask

QUESTION = {"gold": "34", "sides": [("2 \\cdot 17", False)]}

ROOT = pathlib.Path(pool.__file__).parents[2]


def test_hostile_answers_harm_nobody():
    """No call over its limit plus a second, no innocent answer lost in the crowd, the pool alive after its workers."""
    assert_unharmed(pressure())


@pytest.mark.slow
def test_hostile_answers_harm_nobody_in_ray_actors():
    """Two reward workers of one node, each with threads of its own."""
    import ray

    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        path = str(pathlib.Path(__file__).parent)

        @ray.remote(runtime_env={"env_vars": {"PYTHONPATH": path}})
        def reward_worker():
            from pressure import pressure

            return pressure()

        for result in ray.get([reward_worker.remote() for _ in range(2)], timeout=180):
            assert_unharmed(result)
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_hostile_answers_harm_nobody_with_gmpy2(tmp_path):
    """sympy computes with GMP where gmpy2 is installed; no Python signal interrupts that."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "gmpy2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        pytest.skip(f"gmpy2 cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ground = [sys.executable, "-c", "from sympy.external.gmpy import GROUND_TYPES; print(GROUND_TYPES)"]
    assert subprocess.check_output(ground, env=environment, text=True).strip() == "gmpy"
    script = pathlib.Path(__file__).with_name("pressure.py")
    assert_unharmed(json.loads(subprocess.check_output([sys.executable, str(script)], env=environment, text=True)))


def test_replies_are_not_mixed_up_between_threads():
    golds = [str(n) for n in range(60)]
    with ThreadPoolExecutor(8) as threads:
        asked = [(gold, step) for gold in golds for step in (0, 1)]  # right and wrong in turn, so that any two differ
        outcomes = threads.map(lambda pair: grade(rf"\boxed{{{pair[0]} + {pair[1]}}}", pair[0]).outcome, asked)
        assert list(outcomes) == ["right", "wrong"] * 60


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


def test_the_start_of_a_replacement_is_not_taken_from_the_time_of_the_answer(workers, monkeypatch):
    """On a busy node that start takes longer than an answer may."""
    workers.ask(QUESTION, 5.0)
    os.kill(_pids(workers)[0], signal.SIGKILL)
    start = workers._start
    monkeypatch.setattr(workers, "_start", lambda: (time.sleep(1.5), start())[1])
    assert workers.ask(QUESTION, 1.5) == {"right": True}


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
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
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
