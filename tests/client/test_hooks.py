"""What hooks are told of calls and requests, by both clients."""

import asyncio
import dataclasses
import logging
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from graftserve.client import (
    AsyncClient,
    CallStart,
    Client,
    DeadlineExceededError,
    Hooks,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    ModelMismatchError,
    NotFoundError,
    RetryPolicy,
    UnavailableError,
)
from graftserve.client.wire.methods import GET_MODEL_METADATA, GET_MODEL_STATUS, PREDICT
from graftserve.client.wire.tensors import to_proto
from tests.client.async_in_thread import AsyncInThread


@pytest.fixture(autouse=True, params=[Client, AsyncInThread])
def either(request, monkeypatch):
    """Every test here is of both clients."""
    monkeypatch.setattr(request.module, "Client", request.param)


class Notes(Hooks):
    """Writes down what it is told. Callers are numbers."""

    def __init__(self):
        self.calls = []
        self.ends = {}
        self.requests = {}
        self.answers = {}
        self._lock = threading.Lock()

    def call_started(self, call):
        with self._lock:
            self.calls.append(call)
            return len(self.calls) - 1

    def call_ended(self, caller, call, end):
        assert self.calls[caller] is call
        with self._lock:
            assert caller not in self.ends
            self.ends[caller] = end

    def request_started(self, request):
        with self._lock:
            assert request not in self.requests
            self.requests[request] = request
        return {"x-rows": str(request.rows)}

    def request_ended(self, request, end):
        with self._lock:
            assert self.requests[request] is request
            assert request not in self.answers
            self.answers[request] = end

    def pairs(self):
        """Every request with its end; waits for those under way."""
        until(lambda: len(self.answers) == len(self.requests))
        return [(request, self.answers[request]) for request in self.requests]

    def errors(self):
        """What each call raised, in the order of their start."""
        until(lambda: len(self.ends) == len(self.calls))
        return [self.ends[caller].error for caller in range(len(self.calls))]


def until(condition):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def image(length):
    return b"x" * length


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def client(server, notes):
    with Client(server.target, "flowers", timeout_s=20, hooks=notes) as client:
        yield client


# Calls


def test_a_call_and_its_request(client, server, notes):
    client.classify(image(7))
    assert notes.calls == [CallStart("classify", "flowers")]
    ((request, end),) = notes.pairs()
    told = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    assert 0 <= told.pop("queue_s") < 10
    assert told == {
        "target": server.target,
        "model": "flowers",
        "method": PREDICT.path,
        "signature": "serving_default",
        "rows": 1,
        "size_bytes": 7,
        "attempt": 1,
        "hedge": False,
        "explains": False,
        "callers": (0,),
    }
    assert (end.code, end.version, end.error, end.details, end.invalid_rows) == ("OK", 3, "", "", 0)
    assert 0 < end.network_s <= notes.ends[0].duration_s
    assert notes.errors() == [None]
    assert ("x-rows", "1") in server.metadata


def test_every_method_is_one_call(client, notes):
    client.classify(image(1))
    client.classify_many([image(1), image(2)])
    list(client.stream([image(1)]))
    list(client.stream_as_completed([image(1)]))
    client.embed([image(1)])
    client.predict({"x": np.float32([1])}, signature="half_plus_two")
    client.status()
    client.metadata()
    client.wait_until_ready()
    assert [call.method for call in notes.calls] == [
        *("classify", "classify_many", "stream", "stream", "embed", "predict"),
        *("status", "metadata", "wait_until_ready"),
    ]
    assert notes.errors() == [None] * 9
    assert {request.callers for request, _ in notes.pairs()} == {(caller,) for caller in range(9)}
    assert {(request.method, request.signature) for request, _ in notes.pairs()} == {
        (PREDICT.path, "serving_default"),
        (PREDICT.path, "features"),
        (PREDICT.path, "half_plus_two"),
        (GET_MODEL_STATUS.path, ""),
        (GET_MODEL_METADATA.path, ""),
    }


def test_polls_belong_to_the_call_that_waits(client, server, notes):
    server.versions[3] = (20, 0, "")  # LOADING
    waiting = threading.Thread(target=client.wait_until_ready)
    waiting.start()
    until(lambda: len(notes.requests) >= 2)
    server.versions[3] = (30, 0, "")
    waiting.join()
    assert [call.method for call in notes.calls] == ["wait_until_ready"]
    assert notes.errors() == [None]
    assert {request.callers for request, _ in notes.pairs()} == {(0,)}


def test_images_that_cannot_be_read_and_arguments_that_make_no_sense_are_calls(client, notes, tmp_path):
    with pytest.raises(InvalidImageError) as unread:
        client.classify(tmp_path / "missing.jpg")
    with pytest.raises(InvalidImageError) as embedded:
        client.embed([b"", image(1)])
    with pytest.raises(InvalidArgumentError) as alone:
        client.classify_many(b"one image")
    assert notes.errors() == [unread.value, embedded.value, alone.value]


def test_an_image_that_does_not_decode_is_counted_among_the_rows(client, notes):
    with pytest.raises(InvalidImageError):
        client.classify(b"bad")
    results = client.classify_many([image(1), b"bad", image(2)])
    assert isinstance(results[1], InvalidImageError)
    assert [type(error) for error in notes.errors()] == [InvalidImageError, type(None)]
    assert sum(end.invalid_rows for _, end in notes.pairs()) == 2
    assert {(end.code, end.error) for _, end in notes.pairs()} == {("OK", "")}


def test_what_the_callers_iterable_raises_ends_the_call(client, notes):
    def images():
        yield image(1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        client.classify_many(images())
    assert [str(error) for error in notes.errors()] == ["the disk is gone"]


def test_a_stream_that_is_left_early_is_no_failure(client, notes):
    results = client.stream(image(1 + n % 9) for n in range(1000))
    next(results)
    results.close()
    assert notes.errors() == [None]
    assert all(end.error == "" or end.abandoned for _, end in notes.pairs())


# Requests


def test_a_shared_request_names_every_caller(server, notes):
    with (
        Client(server.target, "flowers", max_in_flight=1, timeout_s=20, hooks=notes) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        server.hold = threading.Event()
        first = pool.submit(client.classify, image(9))
        assert server.entered.acquire(timeout=20)
        others = [pool.submit(client.classify, image(n)) for n in range(1, 5)]
        many = pool.submit(client.classify_many, [image(1), image(2)])
        until(lambda: client.stats().queued == 6)
        server.hold.set()
        for call in (first, *others, many):
            call.result()
    (_, _), (shared, end) = notes.pairs()
    assert (shared.rows, sorted(shared.callers), end.code) == (6, [1, 2, 3, 4, 5], "OK")
    assert shared.queue_s > 0


def test_retries_are_told(client, server, notes):
    server.faults = [(grpc.StatusCode.UNAVAILABLE, "going away")]
    client.classify(image(1))
    (first, lost), (second, answered) = notes.pairs()
    assert (first.attempt, first.retry, second.attempt, second.retry) == (1, False, 2, True)
    assert (lost.code, lost.error, lost.details, lost.version, lost.abandoned) == (
        *("UNAVAILABLE", "UNAVAILABLE", "going away", None, False),
    )
    assert answered.code == "OK"
    assert second.callers == first.callers == (0,)
    assert notes.errors() == [None]


def test_hedges_are_told_and_the_loser_is_abandoned(server, notes):
    with Client(server.target, "flowers", retry=RetryPolicy(hedge=True), hooks=notes) as client:
        for _ in range(10):
            client.classify(image(1))
        hold = server.hold_next = threading.Event()
        assert client.classify(image(22)).label == "c2"
        copies = [(request, end) for request, end in notes.pairs() if request.size_bytes == 22]
        hold.set()
    assert [request.hedge for request, _ in copies] == [False] + [True] * (len(copies) - 1)
    assert not any(request.retry for request, _ in copies)
    # Whichever of them came first was held.
    assert {(end.code, end.abandoned) for _, end in copies} == {("OK", False), ("CANCELLED", True)}


def test_a_failing_call(client, server, notes):
    server.faults = [(grpc.StatusCode.DATA_LOSS, "bits fell out")]
    with pytest.raises(InternalError) as failed:
        client.classify(image(1))
    ((_, end),) = notes.pairs()
    assert (end.code, end.error, end.details) == ("DATA_LOSS", "DATA_LOSS", "bits fell out")
    assert notes.errors() == [failed.value]


def test_a_question_why_is_no_retry(client, notes):
    with pytest.raises(InvalidArgumentError):
        client.predict({"y": np.float32([1])}, signature="half_plus_two")
    (refused, _), (question, answer) = notes.pairs()
    assert (refused.explains, question.explains, question.retry) == (False, True, False)
    assert (question.method, question.callers, answer.version) == (GET_MODEL_METADATA.path, (0,), 3)


def test_an_answer_that_makes_no_sense(client, server, notes):
    scores = to_proto(np.zeros((7, 2), np.float32))
    server.rewrite = lambda response: response.outputs["scores"].CopyFrom(scores)
    with pytest.raises(ModelMismatchError) as failed:
        client.classify(image(1))
    ((_, end),) = notes.pairs()
    assert (end.code, end.version, end.error) == ("OK", 3, "ModelMismatchError")
    assert end.details == str(failed.value)


def test_a_server_that_is_not_there(start_server, notes):
    server = start_server()
    server.stop()
    policy = RetryPolicy(max_attempts=2)
    with (
        Client(server.target, "flowers", retry=policy, hooks=notes) as client,
        pytest.raises(UnavailableError) as failed,
    ):
        client.classify(image(1))
    assert [(request.attempt, end.code) for request, end in notes.pairs()] == [
        (1, "UNAVAILABLE"),
        (2, "UNAVAILABLE"),
    ]
    assert notes.errors() == [failed.value]


def test_a_deadline(client, server, notes):
    server.hold = threading.Event()
    with pytest.raises(DeadlineExceededError) as failed:
        client.classify(image(1), timeout_s=0.2)
    server.hold.set()
    assert notes.errors() == [failed.value]
    assert [end.code for _, end in notes.pairs()] in (["DEADLINE_EXCEEDED"], ["CANCELLED"])


def test_the_version_that_answers_is_told(client, server, notes):
    client.classify(image(1))
    server.versions[4] = (30, 0, "")
    client.classify(image(1))
    assert [end.version for _, end in notes.pairs()] == [3, 4]


def test_close_ends_what_is_under_way(server, notes):
    server.hold = threading.Event()
    with Client(server.target, "flowers", timeout_s=20, hooks=notes) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.classify, image(1))
        assert server.entered.acquire(timeout=20)
        client.close()
        failed = call.exception(timeout=20)
    server.hold.set()
    assert notes.errors() == [failed]
    assert [end.code for _, end in notes.pairs()] == ["CANCELLED"]


def test_a_cancelled_task_is_told(server, notes, either):
    async def main():
        async with AsyncClient(server.target, "flowers", timeout_s=20, hooks=notes) as client:
            server.hold = threading.Event()
            call = asyncio.create_task(client.classify(image(1)))
            await asyncio.to_thread(server.entered.acquire, timeout=20)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.hold.set()

    asyncio.run(main())
    assert [type(error) for error in notes.errors()] == [asyncio.CancelledError]
    assert [(end.code, end.abandoned) for _, end in notes.pairs()] == [("CANCELLED", True)]


def test_ctrl_c_is_told(server):
    code = f"""
import os, threading
from graftserve.client import Client, Hooks

request_told = threading.Event()

def say(*words):  # in one piece, from whatever thread
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())

class Notes(Hooks):
    def call_ended(self, caller, call, end):
        say(type(end.error).__name__)
    def request_ended(self, request, end):
        say(end.code, end.abandoned)
        request_told.set()

with Client({server.target!r}, "flowers", timeout_s=60, hooks=Notes()) as client:
    try:
        client.classify(b"abc")
    except KeyboardInterrupt:
        request_told.wait(30)
"""
    server.hold = threading.Event()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert server.entered.acquire(timeout=60)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    server.hold.set()
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["CANCELLED True", "KeyboardInterrupt"]


# Hooks that misbehave, and several of them


class Broken(Hooks):
    def call_started(self, call):
        raise RuntimeError("call_started")

    def call_ended(self, caller, call, end):
        assert caller is None
        raise RuntimeError("call_ended")

    def request_started(self, request):
        assert request.callers == (None,)
        raise RuntimeError("request_started")

    def request_ended(self, request, end):
        raise RuntimeError("request_ended")


def test_what_hooks_raise_stays_away_from_calls(server, caplog):
    with Client(server.target, "flowers", hooks=Broken()) as client:
        assert client.classify(image(7)).label == "c7"
    messages = [record.getMessage() for record in caplog.records if record.name == "graftserve.client"]
    assert messages == [
        f"Broken.{name} failed, 1 times so far; calls go on without it"
        for name in ("call_started", "request_started", "request_ended", "call_ended")
    ]
    assert all(record.exc_info[0] is RuntimeError for record in caplog.records)


def test_a_hook_that_always_fails_does_not_fill_the_log(server, caplog):
    with Client(server.target, "flowers", hooks=Broken()) as client:
        for _ in range(11):
            client.classify(image(7))
    messages = [record.getMessage() for record in caplog.records if record.name == "graftserve.client"]
    assert [message for message in messages if "call_ended" in message] == [
        "Broken.call_ended failed, 1 times so far; calls go on without it",
        "Broken.call_ended failed, 10 times so far; calls go on without it",
    ]


@pytest.mark.parametrize(
    "metadata",
    [{"X-Upper": "a"}, {"x-key": "new\nline"}, {"x-key": b"bytes"}, {"x-bin": "text"}, {"x-key": 3}, "text"],
)
def test_metadata_that_grpc_does_not_take_is_left_out(server, caplog, metadata):
    class Careless(Hooks):
        def request_started(self, request):
            return {**metadata, "x-good": "yes"} if isinstance(metadata, dict) else metadata

    with Client(server.target, "flowers", hooks=Careless()) as client:
        assert client.classify(image(7)).label == "c7"
    assert (("x-good", "yes") in server.metadata) == isinstance(metadata, dict)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "metadata that gRPC does not take" in record.getMessage()


def test_several_hooks_each_have_their_own_callers(server, notes):
    class Second(Notes):
        def call_started(self, call):
            return f"second {super().call_started(call)}"

        def call_ended(self, caller, call, end):
            super().call_ended(int(caller.split()[1]), call, end)

        def request_started(self, request):
            super().request_started(request)
            return {"x-second": "yes"}

    second = Second()
    with Client(server.target, "flowers", hooks=[notes, Broken(), second]) as client:
        client.classify(image(7))
    assert {("x-rows", "1"), ("x-second", "yes")} <= set(server.metadata)
    assert [request.callers for request, _ in notes.pairs()] == [(0,)]
    assert [request.callers for request, _ in second.pairs()] == [("second 0",)]
    assert notes.errors() == second.errors() == [None]


@pytest.mark.parametrize("hooks", [None, ()])
def test_without_hooks_nothing_is_made_to_be_told(server, monkeypatch, hooks):
    made = []
    for name in ("CallStart", "CallEnd"):
        monkeypatch.setattr(f"graftserve.client.hooks.{name}", lambda *_, name=name: made.append(name))
    for name in ("RequestStart", "RequestEnd"):
        monkeypatch.setattr(f"graftserve.client.base.{name}", lambda *_, name=name, **__: made.append(name))
    with Client(server.target, "flowers", hooks=hooks) as client:
        client.classify(image(7))
        client.classify_many([image(7), b"bad"])
        with pytest.raises(InvalidArgumentError):
            client.predict({"y": np.float32([1])}, signature="half_plus_two")
    assert made == []


def test_one_object_serves_several_clients(server, notes):
    with (
        Client(server.target, "flowers", hooks=notes) as first,
        Client(server.target, "trees", hooks=notes) as second,
    ):
        first.classify(image(1))
        with pytest.raises(NotFoundError):
            second.classify(image(1))
    assert [call.model for call in notes.calls] == ["flowers", "trees"]
    assert [request.model for request, _ in notes.pairs()] == ["flowers", "trees"]
