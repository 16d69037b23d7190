"""The metrics of clients, as Prometheus reads them."""

import asyncio
import gc
import re
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from graftserve.client import (
    AsyncClient,
    Client,
    InvalidImageError,
    NotFoundError,
    RetryPolicy,
    UnavailableError,
)
from graftserve.client.hooks import CallEnd, CallStart, RequestEnd, RequestStart
from graftserve.client.prometheus import PrometheusHooks
from graftserve.client.wire.methods import PREDICT
from tests.client.async_in_thread import AsyncInThread

BUCKETS = ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "2.0", "5.0"]


@pytest.fixture(autouse=True, params=[Client, AsyncInThread])
def either(request, monkeypatch):
    """Every test here is of both clients."""
    monkeypatch.setattr(request.module, "Client", request.param)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def hooks(registry):
    return PrometheusHooks(registry)


def image(length):
    return b"x" * length


def until(condition):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


LABELS = ["target", "model_name", "method", "signature", "api", "version", "outcome", "code", "le"]


def scrape(registry):
    """What Prometheus would store: values by name, without the namespace, and labels in the order above."""
    return {
        (
            sample.name.removeprefix("graftserve_client_"),
            *(sample.labels[label] for label in sorted(sample.labels, key=LABELS.index)),
        ): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def settled(registry, target, model="flowers"):
    """Once nothing is under way."""
    until(lambda: scrape(registry)["in_flight_requests", target, model] == 0)
    return scrape(registry)


def test_a_call_and_its_request(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client:
        client.classify(image(7))
    found = settled(registry, server.target)
    assert found["calls_total", "flowers", "classify", "ok"] == 1
    assert found["call_seconds_count", "flowers", "classify"] == 1
    assert found["requests_total", server.target, "flowers", "serving_default", "Predict", "OK"] == 1
    assert found["request_seconds_count", server.target, "flowers", "Predict"] == 1
    assert found["queue_seconds_count", "flowers"] == 1
    assert found["request_rows_sum", "flowers"] == 1
    assert found["valid_rows_total", "flowers", "3"] == 1
    assert found["invalid_rows_total", "flowers", "3"] == 0
    assert found["retries_total", server.target, "flowers"] == 0
    assert found["hedges_total", server.target, "flowers"] == 0
    request_s = found["request_seconds_sum", server.target, "flowers", "Predict"]
    assert 0 < request_s < found["call_seconds_sum", "flowers", "classify"]


def test_buckets_go_from_a_millisecond_to_a_minute(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client:
        client.classify(image(7))
    for name in (
        ("call_seconds_bucket", "flowers", "classify"),
        ("request_seconds_bucket", server.target, "flowers", "Predict"),
        ("queue_seconds_bucket", "flowers"),
    ):
        edges = [key[-1] for key in scrape(registry) if key[:-1] == name]
        assert edges == [*BUCKETS, "10.0", "30.0", "60.0", "+Inf"]


def test_outcomes_of_calls(server, hooks, registry, tmp_path):
    def broken():
        yield image(1)
        raise OSError("gone")

    with Client(server.target, "flowers", hooks=hooks) as client:
        with pytest.raises(InvalidImageError):
            client.classify(b"bad")
        with pytest.raises(InvalidImageError):
            client.classify(tmp_path / "missing.jpg")
        with pytest.raises(OSError, match="gone"):
            client.classify_many(broken())
        server.faults = [(grpc.StatusCode.NOT_FOUND, "no such model")]
        with pytest.raises(NotFoundError):
            client.classify(image(1))
    found = settled(registry, server.target)
    assert {key[2:]: value for key, value in found.items() if key[0] == "calls_total"} == {
        ("classify", "ok"): 0,
        ("classify", "InvalidImageError"): 2,
        ("classify", "NotFoundError"): 1,
        ("classify_many", "ok"): 0,
        ("classify_many", "(other)"): 1,
    }
    assert found["requests_total", server.target, "flowers", "serving_default", "Predict", "NOT_FOUND"] == 1
    assert found["invalid_rows_total", "flowers", "3"] == 1


def test_a_cancelled_call(server, hooks, registry):
    async def main():
        async with AsyncClient(server.target, "flowers", timeout_s=20, hooks=hooks) as client:
            server.hold = threading.Event()
            call = asyncio.create_task(client.classify(image(1)))
            await asyncio.to_thread(server.entered.acquire, timeout=20)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.hold.set()

    asyncio.run(main())
    found = settled(registry, server.target)
    assert found["calls_total", "flowers", "classify", "cancelled"] == 1
    assert found["requests_total", server.target, "flowers", "serving_default", "Predict", "CANCELLED"] == 1


def test_a_shared_request_is_one_of_many_rows(server, hooks, registry):
    with (
        Client(server.target, "flowers", max_in_flight=1, timeout_s=20, hooks=hooks) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        server.hold = threading.Event()
        calls = [pool.submit(client.classify, image(9))]
        assert server.entered.acquire(timeout=20)
        assert scrape(registry)["in_flight_requests", server.target, "flowers"] == 1
        calls += [pool.submit(client.classify, image(n)) for n in range(1, 7)]
        until(lambda: client.stats().queued == 6)
        server.hold.set()
        for call in calls:
            call.result()
    found = settled(registry, server.target)
    assert found["calls_total", "flowers", "classify", "ok"] == 7
    assert found["requests_total", server.target, "flowers", "serving_default", "Predict", "OK"] == 2
    assert (found["request_rows_sum", "flowers"], found["request_rows_count", "flowers"]) == (7, 2)
    assert found["request_rows_bucket", "flowers", "4.0"] == 1
    assert found["request_rows_bucket", "flowers", "8.0"] == 2


def test_retries(server, hooks, registry):
    server.faults = [(grpc.StatusCode.UNAVAILABLE, "going")] * 2
    with Client(server.target, "flowers", hooks=hooks) as client:
        client.classify(image(1))
    found = settled(registry, server.target)
    assert found["retries_total", server.target, "flowers"] == 2
    assert found["requests_total", server.target, "flowers", "serving_default", "Predict", "UNAVAILABLE"] == 2
    assert found["queue_seconds_count", "flowers"] == 1


def test_hedges(server, hooks, registry):
    with Client(server.target, "flowers", retry=RetryPolicy(hedge=True), hooks=hooks) as client:
        for _ in range(10):
            client.classify(image(1))
        before = scrape(registry)["hedges_total", server.target, "flowers"]
        hold = server.hold_next = threading.Event()
        client.classify(image(2))
        hold.set()
        found = settled(registry, server.target)
    assert found["hedges_total", server.target, "flowers"] > before
    assert found["retries_total", server.target, "flowers"] == 0
    assert found["requests_total", server.target, "flowers", "serving_default", "Predict", "CANCELLED"] >= 1


def test_questions_about_the_model_are_no_rows(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client:
        client.status()
        client.metadata()
    found = settled(registry, server.target)
    assert found["requests_total", server.target, "flowers", "", "GetModelStatus", "OK"] == 1
    assert found["requests_total", server.target, "flowers", "", "GetModelMetadata", "OK"] == 1
    assert found["request_rows_count", "flowers"] == found["queue_seconds_count", "flowers"] == 0
    assert not [key for key in found if key[0] == "valid_rows_total"]


def test_hooks_keep_their_registry():
    """Another one in its place in memory would be taken for it, and its hooks would count nowhere."""
    _hooks = PrometheusHooks(registry := CollectorRegistry())
    kept = weakref.ref(registry)
    del registry
    gc.collect()
    assert kept() is not None


# Bounds


def test_only_the_latest_versions_are_kept(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client:
        for version in range(1, 31):
            server.versions = {version: (30, 0, "")}
            client.classify(image(1))
    found = settled(registry, server.target)
    kept = [key[2] for key in found if key[0] == "valid_rows_total"]
    assert kept == [str(version) for version in range(23, 31)]
    assert [key[2] for key in found if key[0] == "invalid_rows_total"] == kept


def test_signatures_without_end_share_a_series(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client:
        for n in range(110):
            with pytest.raises(Exception, match="signature"):
                client.predict({"x": np.float32([1])}, signature=f"signature {n}")
    found = settled(registry, server.target)
    requests = {key: value for key, value in found.items() if key[:1] == ("requests_total",)}
    assert len({key[1:4] for key in requests}) == 101
    assert sum(value for key, value in requests.items() if key[4] == "Predict") == 110
    others = ("(other)", "(other)", "(other)")
    assert requests["requests_total", *others, "Predict", "FAILED_PRECONDITION"] >= 10
    assert settled(registry, "(other)", "(other)")


def test_targets_and_models_without_end_make_no_series_without_end(registry, hooks):
    def pretend(n):
        call = CallStart("classify", f"model {n}")
        request = RequestStart(f"host:{n}", call.model, PREDICT.path, f"{n}", 1, 1, 1, False, False, 0.0, ())
        hooks.request_started(request)
        hooks.request_ended(request, RequestEnd("OK", 0.1, n))
        hooks.call_ended(None, call, CallEnd(0.1, None))

    for n in range(200):
        pretend(n)
    before = scrape(registry)
    for n in range(200, 2000):
        pretend(n)
    after = scrape(registry)
    assert sum(value for key, value in after.items() if key[0] == "requests_total") == 2000
    assert sum(value for key, value in after.items() if key[0] == "calls_total") == 2000
    # What is new are the latest versions of the models that share a name, in place of earlier ones.
    assert {key[:2] for key in set(after) - set(before)} == {
        ("valid_rows_total", "(other)"),
        ("invalid_rows_total", "(other)"),
    }
    assert len(after) == len(before)


def test_hooks_of_one_registry_count_together(server, registry):
    with (
        Client(server.target, "flowers", hooks=PrometheusHooks(registry)) as first,
        Client(server.target, "flowers", hooks=PrometheusHooks(registry)) as second,
    ):
        first.classify(image(1))
        second.classify(image(1))
    assert settled(registry, server.target)["calls_total", "flowers", "classify", "ok"] == 2


def test_namespaces_and_registries_are_apart(server, registry):
    other = CollectorRegistry()
    with Client(
        server.target,
        "flowers",
        hooks=[PrometheusHooks(registry, "a"), PrometheusHooks(registry, "b"), PrometheusHooks(other, "a")],
    ) as client:
        client.classify(image(1))
    labels = {"model_name": "flowers", "method": "classify", "outcome": "ok"}
    assert registry.get_sample_value("a_calls_total", labels) == 1
    assert registry.get_sample_value("b_calls_total", labels) == 1
    assert other.get_sample_value("a_calls_total", labels) == 1


def test_a_registry_that_has_the_names_already(registry):
    Counter("graftserve_client_calls", "Somebody else's.", registry=registry)
    with pytest.raises(ValueError, match="graftserve_client_calls"):
        PrometheusHooks(registry)


def test_registries_are_not_kept(either):
    from graftserve.client.prometheus import _SHARED

    gc.collect()
    before = len(_SHARED)
    PrometheusHooks(CollectorRegistry())
    gc.collect()
    assert len(_SHARED) == before


def test_threads_lose_no_count(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: client.classify(image(1 + n % 9)), range(400)))
    found = settled(registry, server.target)
    assert found["calls_total", "flowers", "classify", "ok"] == 400
    assert found["request_rows_sum", "flowers"] == found["valid_rows_total", "flowers", "3"] == 400


# What is true now


def watch(hooks, client):
    hooks.watch(getattr(client, "_client", client))


def test_a_clients_queue_limits_and_circuits(server, hooks, registry):
    targets = [server.target, "127.0.0.1:1"]
    with (
        Client(
            [server.target], "flowers", max_in_flight=1, max_batch_images=8, timeout_s=20, hooks=hooks
        ) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        watch(hooks, client)
        watch(hooks, client)
        server.hold = threading.Event()
        calls = [pool.submit(client.classify, image(9))]
        assert server.entered.acquire(timeout=20)
        calls += [pool.submit(client.classify, image(n)) for n in range(1, 4)]
        until(lambda: client.stats().queued == 3)
        found = scrape(registry)
        server.hold.set()
        for call in calls:
            call.result()
    assert found["queued_rows", "flowers"] == 3
    assert found["in_flight_batches", "flowers"] == found["max_in_flight_batches", "flowers"] == 1
    assert found["max_batch_rows", "flowers"] == 8
    assert found["circuit_open", targets[0], "flowers"] == 0


def test_an_open_circuit_shows(hooks, registry):
    target = "127.0.0.1:1"
    with Client(target, "flowers", hooks=hooks, retry=RetryPolicy(max_attempts=1)) as client:
        watch(hooks, client)
        until(lambda: not_there(client) and client.stats().targets[0].circuit_open)
        assert scrape(registry)["circuit_open", target, "flowers"] == 1


def not_there(client):
    with pytest.raises(UnavailableError):
        client.classify(image(1))
    return True


def test_clients_of_a_model_are_added_up_until_they_are_closed(server, hooks, registry):
    with (
        Client(server.target, "flowers", max_in_flight=3) as first,
        Client([server.target, "127.0.0.1:1"], "flowers", max_in_flight=5) as second,
        Client(server.target, "trees", max_in_flight=7) as third,
    ):
        for client in (first, second, third):
            watch(hooks, client)
        limits = {key[1]: value for key, value in scrape(registry).items() if "max_in_flight" in key[0]}
        assert limits == {
            "flowers": first.stats().max_in_flight + second.stats().max_in_flight,
            "trees": third.stats().max_in_flight,
        }
        circuits = {key[1:] for key in scrape(registry) if key[0] == "circuit_open"}
        assert circuits == {
            (server.target, "flowers"),
            ("127.0.0.1:1", "flowers"),
            (server.target, "trees"),
        }
        second.close()
        limits = {key[1]: value for key, value in scrape(registry).items() if "max_in_flight" in key[0]}
        assert limits["flowers"] == first.stats().max_in_flight
    assert not [key for key in scrape(registry) if key[0] == "max_in_flight_batches"]


def test_scrapes_while_calls_run(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client, ThreadPoolExecutor(8) as pool:
        watch(hooks, client)
        calls = [pool.submit(client.classify, image(1 + n % 9)) for n in range(300)]
        while not all(call.done() for call in calls):
            assert scrape(registry)["max_batch_rows", "flowers"] == 32
        assert [call.exception() for call in calls] == [None] * 300


# What the documentation says

DOCUMENT = (Path(__file__).parents[2] / "docs" / "client.md").read_text().partition("## Watching it")[2]


def exported(registry):
    """Labels of every family, once all of them have series."""
    labels = {}
    for key in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in key.samples:
            if not sample.name.endswith("_created"):
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.fixture
def everything(server, hooks, registry):
    with Client(server.target, "flowers", hooks=hooks) as client:
        watch(hooks, client)
        client.classify(image(1))
        yield exported(registry)


def test_the_table_lists_all_metrics_with_their_labels(everything):
    rows = re.findall(r"^\| (`[a-z_, `]+`)[^|]*\| ([a-z_, ]+) \|", DOCUMENT.partition("### OpenTel")[0], re.M)
    told = {
        f"graftserve_client_{name}": set(labels.split(", "))
        for names, labels in rows
        for name in re.findall(r"[a-z_]+", names)
    }
    found = {
        name.removesuffix("_bucket"): labels - {"le"}
        for name, labels in everything.items()
        if not name.endswith(("_sum", "_count"))
    }
    assert told == found


def test_the_queries_ask_for_what_there_is(everything):
    promql_parser = pytest.importorskip("promql_parser", reason="needs promql-parser")
    queries = re.findall(r"```promql\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(queries) == 3
    for query in queries:
        promql_parser.parse(query)
        selectors = re.findall(r"(graftserve_client_\w+)(?:\{(\w+))?", query)
        assert selectors
        for name, label in selectors:
            assert {label} - {""} <= everything[name]
        for labels in re.findall(r"\b(?:by|on) \(([a-z_, ]+)\)", query):
            assert all(set(labels.split(", ")) <= everything[name] for name, _ in selectors[:1])


def test_what_is_missing_is_named(either):
    code = """
import sys
sys.modules["prometheus_client"] = None
try:
    import graftserve.client.prometheus
except ImportError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "graftserve.client.prometheus needs prometheus-client: pip install 'graftserve[prometheus]'"
    )


def test_the_default_registry_is_the_one_that_exporters_read(server):
    code = f"""
from graftserve.client import Client
from graftserve.client.prometheus import PrometheusHooks
from prometheus_client import generate_latest
with Client({server.target!r}, "flowers", hooks=PrometheusHooks()) as client:
    client.classify(b"abc")
print(generate_latest().decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = 'graftserve_client_calls_total{method="classify",model_name="flowers",outcome="ok"} 1.0'
    assert line in done.stdout.splitlines()


def test_several_processes_are_added_up(server, tmp_path):
    # prometheus_client's multiprocess mode, as under gunicorn.
    code = f"""
import sys
from graftserve.client import Client
from graftserve.client.prometheus import PrometheusHooks
hooks = PrometheusHooks()
for version in range(12):
    hooks._metrics.versions["flowers"][str(version)]
with Client({server.target!r}, "flowers", hooks=hooks) as client:
    hooks.watch(client)
    client.classify(b"abc")
"""
    from prometheus_client.multiprocess import MultiProcessCollector

    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    assert scrape(registry)["calls_total", "flowers", "classify", "ok"] == 2
