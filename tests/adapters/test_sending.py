"""Weights on their way to a vLLM server, over real sockets: a receiver that ends ends the sender's wait."""

import asyncio
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import zmq
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer

from cppo_verl.adapters.rollout import sending


@pytest.fixture
def sender(monkeypatch, tmp_path):
    """A sender of two buckets through shared memory, and the server's answer that it watches."""
    monkeypatch.setattr(sending, "_INTERVAL", 50)
    monkeypatch.setattr(sending, "_GRACE", 500)
    monkeypatch.setattr(sending.WatchedSender, "receiver", Future())
    # Whatever platform verl has found in this process.
    device = SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None)
    monkeypatch.setattr(bucketed_weight_transfer, "get_torch_device", lambda: device)
    monkeypatch.setattr(bucketed_weight_transfer, "is_support_ipc", lambda: False)
    sender = sending.WatchedSender(f"ipc://{tmp_path}/weights.sock", bucket_size_mb=1, use_shm=True)
    sender.weights = [(name, torch.full((200_000,), value)) for name, value in (("first", 1.0), ("second", 2.0))]
    return sender


def send(sender):
    asyncio.run(sender.async_send_weights(iter(sender.weights)))


def receiver(sender, receive):
    """A thread that receives, and what a server would answer: as a Ray call whose result is not awaited yet."""

    def serve():
        try:
            taker = bucketed_weight_transfer.BucketedWeightReceiver(
                sender.zmq_handle, torch.device("cpu"), use_shm=True
            )
            taker.receive_weights(receive)
            sender.receiver.set_result(None)
        except Exception as error:  # as Ray tells it
            sender.receiver.set_exception(RuntimeError(f"Traceback:\n  File ...\n{type(error).__name__}: {error}\n"))

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_weights_arrive_though_the_receiver_takes_long(sender):
    taken = {}

    def take(weights, is_last):
        time.sleep(0.2)  # several looks
        taken.update({name: weight.clone() for name, weight in weights})

    thread = receiver(sender, take)
    send(sender)
    thread.join()
    assert list(taken) == ["first", "second"]
    assert all(torch.equal(taken[name], weight) for name, weight in sender.weights)


@pytest.mark.parametrize("bucket", [0, 1])
def test_a_receiver_that_fails_ends_the_sender_with_its_cause(sender, bucket):
    asked = []

    def take(weights, is_last):
        asked.append([name for name, _ in weights])
        if len(asked) > bucket:
            raise ValueError("planted")

    thread = receiver(sender, take)
    # verl's receiver then fails to close its shared memory, which is the last that it tells; the log has the first.
    cause = "did not take the new weights: (ValueError: planted|BufferError: cannot close exported pointers exist)$"
    with pytest.raises(sending.WeightsNotReceivedError, match=cause):
        send(sender)
    thread.join()
    assert len(asked) == bucket + 1


def test_a_receiver_that_never_came_is_not_waited_for(sender):
    sender.receiver.set_result(None)
    with pytest.raises(sending.WeightsNotReceivedError, match="it ended before they were complete"):
        send(sender)


def test_an_answer_counts_though_the_receiver_is_done(monkeypatch, tmp_path):
    """The server's may overtake the last bucket's."""
    monkeypatch.setattr(sending, "_INTERVAL", 50)
    done = Future()
    done.set_result(None)
    context = zmq.Context.instance()
    with context.socket(zmq.REQ) as asks, context.socket(zmq.REP) as answers:
        asks.bind(f"ipc://{tmp_path}/a.sock")
        answers.connect(f"ipc://{tmp_path}/a.sock")
        asks.send(b"")
        answers.recv()
        threading.Timer(0.3, answers.send, [b"taken"]).start()
        assert sending.WatchedSocket(asks, done).recv() == b"taken"


def test_it_is_what_verl_sends_with(monkeypatch):
    monkeypatch.setattr(sending.base, "_ROLLOUT_REGISTRY", dict(sending.base._ROLLOUT_REGISTRY))
    monkeypatch.setattr(sending.vllm_rollout, "BucketedWeightSender", sending.BucketedWeightSender)
    assert get_rollout_class("vllm", "async") is not sending.WatchedServerAdapter
    sending.watch()
    assert get_rollout_class("vllm", "async") is sending.WatchedServerAdapter
    assert sending.vllm_rollout.BucketedWeightSender is sending.WatchedSender
