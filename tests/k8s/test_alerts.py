"""The rules of component monitoring in promtool: what each alert fires on, and what comes close to it."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.mixes import mix
from tests.k8s.prometheus import program, queries, rule_groups

pytest.importorskip("yaml", reason="needs PyYAML")

_MIX = mix("production", "progressive")
_KEDA = mix("production", "autoscaling/keda")
_STEP_S = 15

Labels = Mapping[str, str]


def _selector(name: str, labels: Labels) -> str:
    return f"{name}{{{', '.join(f'{key}={json.dumps(value)}' for key, value in labels.items())}}}"


def _labels(pod: str = "a", **others: str) -> dict[str, str]:
    """As a scraped pod has them: by default the stable one, with version 3."""
    return {
        "job": "server",
        "namespace": "graftserve",
        "pod": f"graftserve-stable-{pod}",
        "track": "stable",
        "model_version": "3",
    } | others


def _canary(pod: str = "c", **others: str) -> dict[str, str]:
    return _labels(**{"pod": f"graftserve-canary-{pod}", "track": "canary", "model_version": "4"} | others)


def _up(values: str, labels: Labels) -> dict[str, str]:
    return {_selector("up", labels): values}


def _requests(labels: Labels, **values: str) -> dict[str, str]:
    """How often each status was answered, sample by sample in promtool's notation."""
    name = ":tensorflow:serving:request_count"
    return {
        _selector(name, {**labels, "model_name": "flowers", "status": status}): series
        for status, series in values.items()
    }


def _rows(labels: Labels, **values: str) -> dict[str, str]:
    """valid, invalid: how many images could be read, and could not."""
    return {
        _selector(
            f"graftserve_{kind}_rows_total", {**labels, "model_name": "flowers", "version": "3"}
        ): series
        for kind, series in values.items()
    }


def _latencies(labels: Labels, values: Mapping[str, str]) -> dict[str, str]:
    """values: of each bucket by its upper limit in microseconds."""
    name = ":tensorflow:serving:request_latency_bucket"
    return {
        _selector(
            name, {**labels, "model_name": "flowers", "API": "Predict", "entrypoint": "GRPC", "le": le}
        ): series
        for le, series in values.items()
    }


def _kube(name: str, values: str, **labels: str) -> dict[str, str]:
    """A series of kube-state-metrics."""
    return {_selector(f"kube_{name}", {"namespace": "graftserve", **labels}): values}


def _pull(
    restarts: str, ready: str, pod: str = "graftserve-stable-b", container: str = "pull"
) -> dict[str, str]:
    labels = {"pod": pod, "container": container, "uid": "1"}
    return {
        **_kube("pod_init_container_status_restarts_total", restarts, **labels),
        **_kube("pod_init_container_status_ready", ready, **labels),
    }


def _progressing(status: str, deployment: str = "graftserve-stable") -> dict[str, str]:
    """As kube-state-metrics tells a condition: one series for each status, one of them 1."""
    series = {}
    for one in ("true", "false", "unknown"):
        labels = {"deployment": deployment, "condition": "Progressing", "status": one, "reason": "Any"}
        series |= _kube("deployment_status_condition", f"{int(one == status)}x80", **labels)
    return series


WELL = _up("1x240", _labels())
"""One stable pod that answers."""


@dataclass(frozen=True)
class Case:
    """Samples every 15 s, and what fires at `at`: the labels and the summary by the alert's name.

    No alert but those may fire. values: what expressions give, by the labels; `None` is no series.
    """

    name: str
    series: Mapping[str, str]
    at: str = "10m"
    fires: Mapping[str, Sequence[tuple[Labels, str]]] = field(default_factory=dict)
    values: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]] = field(default_factory=dict)


def _of(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(labels.items())


_STABLE = _of(namespace="graftserve", track="stable", model_version="3")
_CANARY = _of(namespace="graftserve", track="canary", model_version="4")
_DOWN = "No stable pod answers Prometheus"

CASES = [
    Case("all is well, without a call", WELL),
    # GraftserveDown
    Case(
        "no stable pod answers",
        {**_up("1x4 0x80", _labels("a")), **_up("1x4 0x80", _labels("b")), **_up("1x80", _canary())},
        at="4m",
        fires={"GraftserveDown": [({"namespace": "graftserve"}, _DOWN)]},
    ),
    Case("no stable pod answers, for a minute", _up("1x8 0x4 1x80", _labels()), at="3m"),
    Case("one of two answers", {**WELL, **_up("0x80", _labels("b"))}),
    Case("the canary is down", {**WELL, **_up("0x80", _canary())}),
    Case(
        "a rollout: a new pod loads, then the old one goes",
        {
            **_up("1x17 stale", _labels("old")),
            **_up("_x4 0x8 1x80", _labels("new", model_version="4")),
        },
    ),
    Case(
        "Prometheus sees nothing at all",
        _up("1x80", {"job": "node"}),
        fires={"GraftserveDown": [({"job": "server", "track": "stable"}, _DOWN)]},
    ),
    Case(
        "one of two namespaces is down",
        {**WELL, **_up("0x80", _labels(namespace="staging"))},
        fires={"GraftserveDown": [({"namespace": "staging"}, _DOWN)]},
    ),
    Case(
        "one of two namespaces has no pod left",
        {
            **WELL,
            **_kube("deployment_spec_replicas", "2x80", deployment="graftserve-stable"),
            **_kube("deployment_spec_replicas", "2x80", deployment="graftserve-stable", namespace="staging"),
        },
        fires={"GraftserveDown": [({"namespace": "staging"}, _DOWN)]},
    ),
    Case(
        "one of two namespaces is switched off, and a canary nowhere wanted",
        {
            **WELL,
            **_kube("deployment_spec_replicas", "0x80", deployment="graftserve-stable", namespace="staging"),
            **_kube("deployment_spec_replicas", "1x80", deployment="graftserve-canary", namespace="staging"),
        },
    ),
    # GraftserveErrors
    Case(
        "three of a hundred calls fail",
        {**WELL, **_requests(_labels(), OK="0+97x80", INTERNAL="0+2x80", DEADLINE_EXCEEDED="0+1x80")},
        fires={"GraftserveErrors": [(dict(_STABLE), "3% of requests fail in graftserve")]},
        values={
            "graftserve:requests:rate1m * 15": {_STABLE: 100},
            "graftserve:errors:rate1m * 15": {_STABLE: 3},
            "graftserve:errors:ratio1m": {_STABLE: 0.03},
        },
    ),
    Case(
        "one of two pods refuses half of its calls at the door",
        {
            **WELL,
            **_requests(_labels("a"), OK="0+60x80"),
            **_requests(_labels("b"), OK="0+30x80", RESOURCE_EXHAUSTED="0+30x80"),
        },
        fires={"GraftserveErrors": [(dict(_STABLE), "25% of requests fail in graftserve")]},
    ),
    Case(
        "one of a hundred calls fails",
        {**WELL, **_requests(_labels(), OK="0+99x80", INTERNAL="0+1x80")},
        values={"graftserve:errors:ratio1m": {_STABLE: 0.01}},
    ),
    Case(
        "callers make mistakes",
        {
            **WELL,
            **_requests(
                _labels(), OK="0+1x80", INVALID_ARGUMENT="0+9x80", NOT_FOUND="0+5x80", CANCELLED="0+5x80"
            ),
        },
        values={"graftserve:errors:ratio1m": {_STABLE: 0}},
    ),
    Case(
        "calls failed, for two minutes",
        {**WELL, **_requests(_labels(), OK="0+9x80", INTERNAL="0x20 0+9x8 72x60")},
        at="7m30s",
    ),
    Case(
        "nobody calls any more, after failures",
        {**WELL, **_requests(_labels(), OK="5x80", INTERNAL="5x80")},
        values={
            "graftserve:requests:rate1m": {_STABLE: 0},
            "graftserve:errors:rate1m": {_STABLE: 0},
            "graftserve:errors:ratio1m": {},
        },
    ),
    Case(
        "a pod restarts, and counts from nothing again",
        {**WELL, **_requests(_labels(), OK="0+99x20 0+99x60", INTERNAL="500+1x20 0+1x60")},
        at="5m30s",
    ),
    Case(
        "a rollout: the new version fails, the old one does not",
        {
            **WELL,
            **_requests(_labels("old"), OK="0+90x80"),
            **_requests(_labels("new", model_version="4"), OK="0+9x80", INTERNAL="0+1x80"),
        },
        fires={
            "GraftserveErrors": [
                (
                    {"namespace": "graftserve", "track": "stable", "model_version": "4"},
                    "10% of requests fail in graftserve",
                )
            ]
        },
    ),
    Case(
        "one of two namespaces fails",
        {
            **WELL,
            **_requests(_labels(), OK="0+90x80"),
            **_requests(_labels(namespace="staging"), OK="0+1x80", UNAVAILABLE="0+1x80"),
        },
        fires={
            "GraftserveErrors": [
                (
                    {"namespace": "staging", "track": "stable", "model_version": "3"},
                    "50% of requests fail in staging",
                )
            ]
        },
    ),
    # GraftserveSlow
    Case(
        "all calls take between one and two seconds",
        {**WELL, **_latencies(_labels(), {"1e+06": "0x120", "2e+06": "0+15x120", "+Inf": "0+15x120"})},
        at="20m",
        fires={
            "GraftserveSlow": [(dict(_STABLE), "The slowest percent of calls takes 1.99s in graftserve")],
        },
        values={"graftserve:latency_seconds:p99": {_STABLE: 1.99}},
    ),
    Case(
        "all calls take half a second to one",
        {**WELL, **_latencies(_labels(), {"500000": "0x120", "1e+06": "0+15x120", "+Inf": "0+15x120"})},
        at="20m",
        values={"graftserve:latency_seconds:p99": {_STABLE: 0.995}},
    ),
    Case(
        "calls were slow for some minutes, then there were none",
        {
            **WELL,
            **_latencies(_labels(), {"1e+06": "0x120", "2e+06": "0+15x24 375x96", "+Inf": "0+15x24 375x96"}),
        },
        at="15m",
        values={"graftserve:latency_seconds:p99 > 0": {}},
    ),
    Case(
        "the canary is slow",
        {**WELL, **_latencies(_canary(), {"1e+06": "0x120", "2e+06": "0+15x120", "+Inf": "0+15x120"})},
        at="20m",
        values={"graftserve:latency_seconds:p99": {_CANARY: 1.99}},
    ),
    # What the autoscaler asks for
    Case(
        "our server tells what is under way",
        {
            **WELL,
            _selector("graftserve_in_flight_requests", _labels("a")): "9x30 3x50",
            _selector("graftserve_in_flight_requests", _labels("b")): "5x80",
            _selector(":tensorflow:serving:request_latency_sum", _labels("a")): "0+15000000x80",
        },
        values={"graftserve:requests_in_flight:avg1m": {_of(namespace="graftserve", track="stable"): 8}},
    ),
    Case(
        "TensorFlow Serving tells how long it took: two seconds in each",
        {**WELL, _selector(":tensorflow:serving:request_latency_sum", _labels()): "0+30000000x80"},
        values={"graftserve:requests_in_flight:avg1m": {_of(namespace="graftserve", track="stable"): 2}},
    ),
    # GraftserveRestarts
    Case(
        "a server restarts three times",
        {
            **WELL,
            **_kube(
                "pod_container_status_restarts_total",
                "0x8 1x4 2x8 3x60",
                pod="graftserve-stable-b",
                container="server",
            ),
        },
        fires={
            "GraftserveRestarts": [
                (
                    {"namespace": "graftserve", "pod": "graftserve-stable-b"},
                    "graftserve-stable-b keeps restarting",
                )
            ]
        },
    ),
    Case(
        "servers restart once each, and somebody else's pod often",
        {
            **WELL,
            **_kube(
                "pod_container_status_restarts_total",
                "0x8 1x60",
                pod="graftserve-stable-b",
                container="server",
            ),
            **_kube(
                "pod_container_status_restarts_total",
                "0x8 1x60",
                pod="graftserve-stable-d",
                container="server",
            ),
            **_kube(
                "pod_container_status_restarts_total",
                "0x8 1x60",
                pod="graftserve-canary-c",
                container="server",
            ),
            **_kube("pod_container_status_restarts_total", "0+1x80", pod="shop-b", container="server"),
        },
    ),
    Case(
        "a server restarted three times, an hour ago",
        {
            **WELL,
            **_kube(
                "pod_container_status_restarts_total",
                "0x8 1x4 2x8 3x220",
                pod="graftserve-stable-b",
                container="server",
            ),
        },
        at="1h",
    ),
    # GraftserveCanaryWorse
    Case(
        "the canary fails more often",
        {
            **WELL,
            **_requests(_labels(), OK="0+90x80"),
            **_requests(_canary(), OK="0+95x80", INTERNAL="0+5x80"),
        },
        fires={
            "GraftserveCanaryWorse": [
                (dict(_CANARY), "Version 4 on trial fails more often than the stable one"),
            ]
        },
    ),
    Case(
        "both fail, the canary not more often",
        {
            **WELL,
            **_requests(_labels(), OK="0+98x80", INTERNAL="0+2x80"),
            **_requests(_canary(), OK="0+98x80", INTERNAL="0+2x80"),
        },
    ),
    Case(
        "one call of the one canary pod fails",
        {
            **WELL,
            **_requests(_labels(), OK="0+90x80"),
            **_requests(_canary(), OK="0+1x80", INTERNAL="0x37 1x43"),
        },
        at="10m",
        values={"graftserve:errors:ratio1m": {_STABLE: 0, _CANARY: 0.2}},
    ),
    Case(
        "the canary has no traffic",
        {**WELL, **_requests(_labels(), OK="0+90x80"), **_requests(_canary(), OK="3x80", INTERNAL="3x80")},
    ),
    Case(
        "the canary of another namespace, which has no stable calls",
        {
            **WELL,
            **_requests(_labels(), OK="0+90x80"),
            **_requests(_canary(namespace="staging"), INTERNAL="0+5x80"),
        },
    ),
    # GraftservePullFailed
    Case(
        "a pull fails again and again",
        {**WELL, **_pull("0x2 1x2 2x4 3x80", "0x80")},
        fires={
            "GraftservePullFailed": [
                (
                    {"namespace": "graftserve", "pod": "graftserve-stable-b"},
                    "graftserve-stable-b has no version to serve: its pull has failed 3 times",
                )
            ]
        },
    ),
    Case("a pull fails twice, and is at it again", {**WELL, **_pull("0x2 1x2 2x80", "0x80")}),
    Case("a pull came through at last", {**WELL, **_pull("0x2 1x2 2x4 3x80", "0x20 1x80")}),
    Case("somebody else's pull fails", {**WELL, **_pull("5x80", "0x80", pod="shop-b")}),
    Case("a mesh's init container fails", {**WELL, **_pull("5x80", "0x80", container="istio-init")}),
    # GraftserveRolloutStuck
    Case(
        "a Deployment gives up",
        {**WELL, **_progressing("false", "graftserve-canary"), **_progressing("true")},
        fires={
            "GraftserveRolloutStuck": [
                (
                    {"namespace": "graftserve", "deployment": "graftserve-canary"},
                    "graftserve-canary has not become ready in its time",
                )
            ]
        },
    ),
    Case(
        "rollouts are under way, and somebody else's is stuck",
        {
            **WELL,
            **_progressing("true"),
            **_progressing("unknown", "graftserve-canary"),
            **_progressing("false", "shop"),
        },
    ),
    # GraftserveUnreadableImages
    Case(
        "a tenth of images cannot be read",
        {
            **WELL,
            **_rows(_labels("a"), valid="0+45x160", invalid="0+5x160"),
            **_rows(_labels("b"), valid="0+45x160", invalid="0+5x160"),
        },
        at="35m",
        fires={
            "GraftserveUnreadableImages": [
                ({"namespace": "graftserve", "track": "stable"}, "10% of images cannot be read")
            ]
        },
    ),
    Case(
        "one of a hundred images cannot be read",
        {**WELL, **_rows(_labels(), valid="0+99x160", invalid="0+1x160")},
        at="35m",
    ),
    Case(
        "a tenth of images cannot be read, for ten minutes",
        {**WELL, **_rows(_labels(), valid="0+45x160", invalid="0x100 0+5x60")},
        at="35m",
    ),
    Case(
        "nobody sends images any more, after some that could not be read",
        {**WELL, **_rows(_labels(), valid="9x160", invalid="9x160")},
        at="35m",
    ),
    # What Argo Rollouts asks about the pods on trial
    Case(
        "pods on trial fail and are slow, the stable ones are not",
        {
            **WELL,
            **_requests(_labels("a", rollout_hash="old"), OK="0+90x80"),
            **_requests(_labels("b", rollout_hash="abc"), OK="0+95x80", INTERNAL="0+5x80"),
            **_latencies(_labels("a", rollout_hash="old"), {"1e+06": "0+15x80", "+Inf": "0+15x80"}),
            **_latencies(
                _labels("b", rollout_hash="abc"), {"1e+06": "0x80", "2e+06": "0+15x80", "+Inf": "0+15x80"}
            ),
        },
        at="2m",
        values={"error-rate": {(): 0.05}, "p99-seconds": {(): 1.99}},
    ),
    Case(
        "pods on trial answer well",
        {**WELL, **_requests(_labels("b", rollout_hash="abc"), OK="0+95x80")},
        values={"error-rate": {(): 0}, "p99-seconds": {}},
    ),
    Case(
        "nobody asks the pods on trial",
        {**WELL, **_requests(_labels("a", rollout_hash="old"), OK="0+90x80")},
        values={"error-rate": {}, "p99-seconds": {}},
    ),
    Case(
        "KEDA asks for the stable requests of its namespace",
        {
            **WELL,
            _selector("graftserve_in_flight_requests", _labels("a")): "3x80",
            _selector("graftserve_in_flight_requests", _canary()): "7x80",
            _selector("graftserve_in_flight_requests", _labels(namespace="staging")): "9x80",
        },
        values={"prometheus": {(): 3}},
    ),
]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(json.dumps({"groups": rule_groups(_MIX)}))
    return file


def _asked() -> dict[str, str]:
    """What others than Prometheus ask, by name."""
    asked = dict(queries(_MIX, "AnalysisTemplate")) | dict(queries(_KEDA, "ScaledObject"))
    return {name: query.replace("{{args.canary-hash}}", "abc") for name, query in asked.items()}


def _alerts() -> dict[str, Mapping[str, Any]]:
    return {rule["alert"]: rule for group in rule_groups(_MIX) for rule in group["rules"] if "alert" in rule}


def test_promtool_accepts_the_rules(rules: Path) -> None:
    command = [program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(rules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    number = sum(len(group["rules"]) for group in rule_groups(_MIX))
    assert f"{number} rules found" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_what_fires_and_what_does_not(case: Case, rules: Path, tmp_path: Path) -> None:
    alerts = _alerts()
    assert case.fires.keys() <= alerts.keys()
    expected = []
    for name, rule in alerts.items():
        fixed = {key: text for key, text in rule["annotations"].items() if key != "summary"}
        assert "{{" not in "".join(fixed.values())
        firing = [
            {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": {**fixed, "summary": summary}}
            for labels, summary in case.fires.get(name, ())
        ]
        expected.append({"eval_time": case.at, "alertname": name, "exp_alerts": firing})
    asked = _asked()
    values = [
        {
            # promtool compares to the last bit.
            "expr": f"round({asked.get(expression, expression)}, 0.0001)",
            "eval_time": case.at,
            "exp_samples": [
                {"labels": _selector("", dict(labels)), "value": value} for labels, value in results.items()
            ],
        }
        for expression, results in case.values.items()
    ]
    test = {
        "interval": f"{_STEP_S}s",
        "input_series": [{"series": name, "values": series} for name, series in case.series.items()],
        "alert_rule_test": expected,
        "promql_expr_test": values,
    }
    file = tmp_path / "test.yaml"
    file.write_text(
        json.dumps(
            {
                "rule_files": [str(rules)],
                "evaluation_interval": f"{_STEP_S}s",
                "group_eval_order": ["graftserve-recording", "graftserve-alerts"],
                "tests": [test],
            }
        )
    )
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_its_cases() -> None:
    """An alert fires in some case; what is recorded or asked by others is looked at in some."""
    assert {name for case in CASES for name in case.fires} == _alerts().keys()
    recorded = {rule["record"] for group in rule_groups(_MIX) for rule in group["rules"] if "record" in rule}
    looked_at = " ".join(expression for case in CASES for expression in case.values)
    assert {name for name in {*recorded, *_asked()} if name not in looked_at} == set()
