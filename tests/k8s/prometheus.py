"""Prometheus' own programs, and our rules as its operator hands them over."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from tests.k8s.mixes import Mix


def program(name: str) -> str:
    """The path of prometheus or promtool. Where everything is tested, nothing is left out unseen."""
    path = shutil.which(name)
    if path is None:
        report = pytest.fail if os.environ.get("CI") else pytest.skip
        report(f"needs Prometheus: found no {name} on the PATH")
    return path


def rule_groups(some: Mix) -> list[dict[str, Any]]:
    """What stands under "groups" in a file of rules; of all PrometheusRules."""
    return [group for item in some.of("PrometheusRule") for group in item["spec"]["groups"]]


def queries(some: Mix, kind: str) -> Iterator[tuple[str, str]]:
    """Name and PromQL of what Argo Rollouts (AnalysisTemplate) or KEDA (ScaledObject) asks."""
    for item in some.of(kind):
        for metric in item["spec"].get("metrics", []):
            if "prometheus" in metric["provider"]:
                yield metric["name"], metric["provider"]["prometheus"]["query"]
        for trigger in item["spec"].get("triggers", []):
            yield trigger["type"], trigger["metadata"]["query"]


def scrape_config(some: Mix, labels: Mapping[str, str], target: str, interval: str) -> dict[str, Any]:
    """What the operator makes of the PodMonitor, for one pod with these labels, at a fixed address.

    The real one finds pods at the API server; labels and namespace are all that it adds here.
    """
    monitor = some.one("PodMonitor", "graftserve")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    found = {
        f"__meta_kubernetes_pod_label_{re.sub('[^a-z]', '_', key)}": text for key, text in labels.items()
    }
    return {
        "job_name": "podMonitor/graftserve",
        "metrics_path": endpoint["path"],
        "scrape_interval": interval,
        "scrape_timeout": interval,
        "static_configs": [
            {"targets": [target], "labels": {**found, "namespace": monitor["metadata"]["namespace"]}}
        ],
        "relabel_configs": [
            {re.sub("(?=[A-Z])", "_", key).lower(): value for key, value in item.items()}
            for item in endpoint["relabelings"]
        ],
    }


class Prometheus:
    """A Prometheus of its own in `folder`, on a free port, for as long as the context lasts."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        (folder / "prometheus.yaml").write_text(json.dumps(config))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"127.0.0.1:{listening.getsockname()[1]}"
        self._url = f"http://{address}"
        self._log = folder / "prometheus.log"
        self._command = [
            program("prometheus"),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + 60
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.__exit__()
                pytest.fail(self._log.read_text())
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series, without its name."""
        answer = self._get("query?" + urllib.parse.urlencode({"query": expression}))
        series = [(item["metric"], float(item["value"][1])) for item in answer["result"]]
        return [({key: text for key, text in labels.items() if key != "__name__"}, n) for labels, n in series]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health, its last error and its alerts."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def alerts(self) -> dict[str, list[dict[str, Any]]]:
        """What is pending or firing, by name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in self._get("alerts")["alerts"]:
            found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}", timeout=30) as answer:
            return json.load(answer)["data"]

    def _is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=5).close()
        except OSError:
            return False
        return True
