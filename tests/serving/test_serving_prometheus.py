"""A real Prometheus with the rules of component monitoring, which scrapes a real server as in a cluster."""

import copy
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftserve.client import Client, DeadlineExceededError, OverloadedError
from tests.k8s.mixes import mix
from tests.k8s.prometheus import Prometheus, rule_groups, scrape_config

_CONFIG = Path(__file__).parents[2] / "k8s/base/pod/monitoring.config"
_LABELS = {"namespace": "graftserve", "track": "stable", "model_version": "3"}
_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Served:
    """`graftserve serve` in a process of its own."""

    process: "subprocess.Popen[bytes]"
    grpc_address: str
    rest_address: str


@pytest.fixture
def served(publish: Callable[[str, Path], Path], tmp_path: Path) -> Iterator[Served]:
    """The model "many", version 3: one call at a time, and one may wait."""
    publish("many", tmp_path / "many" / "3")
    command = [
        *(sys.executable, "-m", "graftserve.cli", "serve", "--runtime=embedded", "--host=127.0.0.1"),
        *("--port=0", "--rest_api_port=-1", "--grpc_max_threads=1", "--max_queued_requests=1"),
        *(
            "--model_name=many",
            f"--model_base_path={tmp_path / 'many'}",
            f"--monitoring_config_file={_CONFIG}",
        ),
    ]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while (ready := re.search(r"ready: .* gRPC (\S+), REST (\S+)\n", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield Served(process, ready[1], ready[2])
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def prometheus(served: Served, tmp_path: Path) -> Iterator[Prometheus]:
    """Looks every second, and waits with no alert; the rules are otherwise the component's."""
    some = mix("production")
    groups = copy.deepcopy(rule_groups(some))
    for group in groups:
        group["interval"] = "1s"
        for rule in group["rules"]:
            if "alert" in rule:
                rule["for"] = "0s"
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": groups}))
    pod = {"graftserve.dev/track": "stable", "graftserve.dev/version": "3"}
    config = {
        "rule_files": [str(tmp_path / "rules.yaml")],
        "scrape_configs": [scrape_config(some, pod, served.rest_address, "1s")],
    }
    with Prometheus(tmp_path, config) as prometheus:
        yield prometheus


def _eventually(what: Callable[[], Any], meanwhile: Callable[[], object] = lambda: None) -> Any:
    """what(), as soon as that is something."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not (found := what()):
        assert time.monotonic() < deadline_s, "it did not come to pass"
        meanwhile()
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_prometheus_sees_traffic_failures_an_overload_and_the_end(
    served: Served, prometheus: Prometheus
) -> None:
    def value(name: str, labels: dict[str, str] = _LABELS) -> float:
        """Of the recorded series, which must be the only one; NaN if there is none yet."""
        series = prometheus.ask(name)
        assert [found for found, _ in series] in ([], [labels]), series
        return series[0][1] if series else np.nan

    with Client(served.grpc_address, "many", timeout_s=30) as client:

        def succeed() -> None:
            assert client.predict({"text": [b"a"]}, merge_rows=True)["length"].tolist() == [1]

        _eventually(lambda: value("graftserve:requests:rate1m") > 0, succeed)
        _eventually(lambda: 0 < value("graftserve:latency_seconds:p99") < 30, succeed)
        assert value("graftserve:errors:rate1m") == value("graftserve:errors:ratio1m") == 0
        # One at most: there is one thread.
        track = {"namespace": "graftserve", "track": "stable"}
        assert 0 <= value("graftserve:requests_in_flight:avg1m", track) <= 1
        _eventually(lambda: "GraftserveDown" not in prometheus.alerts())  # as it was before the first scrape
        assert [(rule["name"], rule["health"], rule.get("lastError")) for rule in prometheus.rules()] == [
            (rule["name"], "ok", None) for rule in prometheus.rules()
        ]

    over = threading.Event()

    def spin(_: int) -> None:
        with Client(served.grpc_address, "many", timeout_s=0.5) as client:
            while not over.is_set():
                with pytest.raises((DeadlineExceededError, OverloadedError)):
                    client.predict({"rounds": np.int32(2**31 - 1)}, signature="spin")

    with ThreadPoolExecutor(4) as pool:
        spinning = pool.map(spin, range(4))
        try:
            _eventually(lambda: value("graftserve:errors:ratio1m") > 0.02)
            (errors,) = _eventually(lambda: prometheus.alerts().get("GraftserveErrors"))
            statuses = 'rate(:tensorflow:serving:request_count{status!="OK"}[1m]) > 0'
            _eventually(
                lambda: (
                    {labels["status"] for labels, _ in prometheus.ask(statuses)}
                    >= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
                )
            )
        finally:
            over.set()
        assert list(spinning) == [None] * 4
    assert errors["labels"] == {**_LABELS, "alertname": "GraftserveErrors", "severity": "critical"}
    assert re.fullmatch(r"[\d.]+% of requests fail in graftserve", errors["annotations"]["summary"])
    assert "GraftserveDown" not in prometheus.alerts()

    served.process.terminate()
    assert served.process.wait(_TIMEOUT_S) == 0
    (down,) = _eventually(lambda: prometheus.alerts().get("GraftserveDown"))
    assert down["labels"] == {
        "alertname": "GraftserveDown",
        "namespace": "graftserve",
        "severity": "critical",
    }
    assert down["annotations"]["runbook"] == "docs/operations.md#pods-are-not-ready"
