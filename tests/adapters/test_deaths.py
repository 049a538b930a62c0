"""Processes whose death nobody would notice: one of them dead, the run ends and says which."""

import os
import signal
import threading
import time

import pytest

# Seconds after which a wait would count as for ever.
LONG = 60


@pytest.fixture(scope="module")
def ray():
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def queue(ray):
    @ray.remote
    class Queue:
        def pid(self):
            return os.getpid()

        def work(self, seconds):
            time.sleep(seconds)

    return Queue.remote()


@pytest.mark.alone
def test_a_death_ends_a_wait_and_is_named(ray):
    from cppo_verl.adapters.driver.deaths import ProcessDied, ending_the_run

    alive, killed = queue(ray), queue(ray)
    pid = ray.get(killed.pid.remote())
    before = signal.getsignal(signal.SIGRTMIN + 1)
    began = time.monotonic()

    def wait():
        with ending_the_run({"the controller": alive, "the storage": killed}, interval=0.1):
            os.kill(pid, signal.SIGKILL)
            threading.Event().wait(LONG)

    with pytest.raises(ProcessDied, match=r"^the storage is dead, and what it held is lost: .{20,}run.resume=true"):
        wait()
    assert time.monotonic() - began < LONG / 2
    assert signal.getsignal(signal.SIGRTMIN + 1) == before
    assert "deaths" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.alone
def test_a_busy_process_is_not_dead(ray):
    from cppo_verl.adapters.driver.deaths import ending_the_run

    busy = queue(ray)
    work = busy.work.remote(3)
    with ending_the_run({"the storage": busy}, interval=0.1):
        time.sleep(2)
        assert not ray.wait([work], timeout=0)[0]
        ray.get(work)
        time.sleep(1)


@pytest.mark.alone
def test_in_an_actor_as_on_gpus(ray):
    """There the driver is an actor of its own."""

    @ray.remote
    class Driver:
        def wait_beside(self, actor, pid):
            import os
            import signal
            import threading

            from cppo_verl.adapters.driver.deaths import ProcessDied, ending_the_run

            try:
                with ending_the_run({"the controller": actor}, interval=0.1):
                    os.kill(pid, signal.SIGKILL)
                    threading.Event().wait(60)
            except ProcessDied as error:
                return str(error)
            return "nothing was noticed"

    killed = queue(ray)
    driver = Driver.remote()
    told = ray.get(driver.wait_beside.remote(killed, ray.get(killed.pid.remote())), timeout=LONG)
    assert told.startswith("the controller is dead")
