"""Processes for whose answer a run waits without a limit, so that their death would be silence: it ends the run."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from omegaconf import DictConfig
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError

# Seconds between two looks.
_INTERVAL = 5.0
# Wakes the main thread wherever it waits. Ray, vLLM and the run's other watches use other signals.
_SIGNAL = signal.SIGRTMIN + 1


class ProcessDied(RuntimeError):
    """A process without which a run cannot go on is dead."""


def queue_actors(config: DictConfig) -> dict[str, ActorHandle]:
    """TransferQueue's own processes, as they are called in messages. Its clients wait for the controller for ever, for
    a storage unit 200 s. Other backends than SimpleStorage have no storage among Ray's actors."""
    actors = {"the queue's controller": ray.get_actor("TransferQueueController", namespace="transfer_queue")}
    backend = config.transfer_queue.backend
    if backend.storage_backend == "SimpleStorage":
        for unit in range(backend.SimpleStorage.num_data_storage_units):
            actors[f"the queue's storage unit {unit}"] = ray.get_actor(f"TransferQueueStorageUnit#{unit}")
    return actors


@contextmanager
def ending_the_run(actors: Mapping[str, Any], interval: float = _INTERVAL) -> Iterator[None]:
    """While the block runs, the death of one of ``actors`` raises in it. In the main thread, where signals arrive.

    Args:
        actors: Ray actors by what a message calls them.
        interval: seconds between two looks.

    Raises:
        ProcessDied: names the actor and what Ray knows of its end.
    """
    told: list[str] = []
    here, over = threading.get_ident(), threading.Event()

    def wake(*_: Any) -> None:
        if not over.is_set():
            over.set()
            raise ProcessDied(told[0])

    def look() -> None:
        asked = {actor.__ray_ready__.remote(): name for name, actor in actors.items()}
        while not over.wait(interval):
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for answer in answered:
                name = asked.pop(answer)
                if end := _end_of(answer):
                    told.append(
                        f"{name} is dead, and what it held is lost: {end}. The last checkpoint is intact; "
                        "run.resume=true continues from it"
                    )
                    signal.pthread_kill(here, _SIGNAL)
                    return
                asked[actors[name].__ray_ready__.remote()] = name

    before = signal.signal(_SIGNAL, wake)
    watch = threading.Thread(target=look, name="deaths", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
        signal.signal(_SIGNAL, before)


def _end_of(answer: Any) -> str:
    """How the actor that should have answered ended; empty where it has answered or may come back."""
    try:
        ray.get(answer)
    except ActorUnavailableError:
        return ""
    except RayActorError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__)[:500].rstrip(".")
    return ""
