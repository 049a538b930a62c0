"""Weights on their way to a vLLM server: one that fails while it receives them ends the run.

verl's sender waits for the receiver, and for its answer to every bucket, in calls that block without a limit, and looks
at what the server itself has answered afterwards: a receiver that failed was silence until the stall watch.
"""

from concurrent.futures import Future
from typing import Any

import zmq
from verl.checkpoint_engine.base import CheckpointEngineWorker
from verl.workers.rollout import base
from verl.workers.rollout.vllm_rollout import ServerAdapter, vllm_rollout
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

from cppo_verl.adapters import store

_METHOD = "update_weights_from_ipc"
# Milliseconds between two looks at the server's own answer; and how long the last bucket's may be under way beside it.
_INTERVAL, _GRACE = 1000, 5000


class WeightsNotReceivedError(RuntimeError):
    """A rollout server failed while weights were sent to it."""


class WatchedSocket:
    """The sender's socket, which waits for the receiver no longer than it is there.

    Args:
        socket: of the sender, a request socket.
        receiver: the answer of the server whose worker receives.
    """

    def __init__(self, socket: zmq.Socket, receiver: Future[Any]) -> None:
        self._socket, self._receiver = socket, receiver

    def send_pyobj(self, sent: Any) -> None:
        """Raises WeightsNotReceivedError where no receiver is there any more."""
        self._wait_for(zmq.POLLOUT)
        self._socket.send_pyobj(sent)

    def recv(self) -> Any:
        """Raises WeightsNotReceivedError where no answer can come any more."""
        self._wait_for(zmq.POLLIN)
        return self._socket.recv()

    def _wait_for(self, event: int) -> None:
        while not self._socket.poll(_INTERVAL, event):
            if self._receiver.done() and not self._socket.poll(_GRACE, event):
                error = self._receiver.exception()
                lines = str(error or "it ended before they were complete").strip().splitlines()
                raise WeightsNotReceivedError(f"the vLLM server did not take the new weights: {lines[-1]}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class WatchedServerAdapter(ServerAdapter):
    """verl's hand at the server, which knows the server's answer while it sends."""

    async def _execute_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        answer = await super()._execute_method(method, *args, **kwargs)
        if method == _METHOD:
            # Only the first rank of a server has asked it; its failure ends the others' wait as well, with the run.
            WatchedSender.receiver = None if answer is None else answer.future()
        return answer


class WatchedSender(BucketedWeightSender):
    """verl's sender, on a :class:`WatchedSocket` where this process knows the server's answer."""

    receiver: Future[Any] | None = None
    socket: Any

    def _init_socket(self) -> None:
        super()._init_socket()
        if self.receiver is not None:
            self.socket = WatchedSocket(self.socket, self.receiver)


class WatchedReceiver(CheckpointEngineWorker):
    """verl's worker beside a server of its own: it takes the weights from the actors and hands them to the server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        store.listen_on_its_host()
        watch()
        super().__init__(*args, **kwargs)


def watch() -> None:
    """Have this process send weights to servers in this way."""
    base._ROLLOUT_REGISTRY["vllm", "async"] = f"{__name__}.{WatchedServerAdapter.__name__}"
    vllm_rollout.BucketedWeightSender = WatchedSender
