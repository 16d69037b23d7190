"""docs/operations.md, tried: what it quotes is made to happen, what it says to type can be typed.

A line in one of its text blocks is quoted word for word; "..." stands for anything. `quoted` finds one by a
part of it, and every one must be found, so that nothing is quoted that no test here has produced.
"""

import datetime
import gc
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import fsspec
import grpc
import numpy as np
import pytest
import trustme

from graftserve.cli.app import _run, cli
from graftserve.client import (
    Client,
    ClientError,
    DeadlineExceededError,
    InvalidArgumentError,
    InvalidImageError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from graftserve.client.testing import FakeServer
from graftserve.export.manifest import write_manifest
from graftserve.export.store import Store, open_store
from graftserve.k8s.manifests import copy_manifests
from graftserve.k8s.render import KubectlError, find_kubectl
from graftserve.serving.app import Server, run
from graftserve.serving.flags import Options, parse_args
from graftserve.serving.policy import State
from tests.k8s.fake_api import FakeApi
from tests.k8s.small_overlay import copy_small_overlay

_ROOT = Path(__file__).parents[1]
_RUNBOOK = _ROOT / "docs/operations.md"
_MONITORING = _ROOT / "k8s/components/monitoring"
_JPEG = b"\xff\xd8"

# The document


@dataclass(frozen=True)
class Block:
    """A fenced block. section: the heading above it."""

    section: str
    language: str
    lines: tuple[str, ...]


@cache
def _blocks() -> tuple[Block, ...]:
    blocks: list[Block] = []
    section, language, lines = "", None, []
    for line in _RUNBOOK.read_text(encoding="utf-8").splitlines():
        if language is None:
            if line.startswith("## "):
                section = line.removeprefix("## ")
            elif line.startswith("```"):
                language, lines = line.removeprefix("```"), []
        elif line == "```":
            blocks.append(Block(section, language, tuple(lines)))
            language = None
        else:
            lines.append(line)
    assert language is None
    return tuple(blocks)


def _lines(language: str) -> list[str]:
    return [line for block in _blocks() if block.language == language for line in block.lines]


def _prose() -> str:
    return re.sub(r"^```.*?^```$", "", _RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


_found: list[str] = []


def quoted(part: str) -> str:
    """The one line of the runbook's text blocks that holds `part`. For the module's own level; see above."""
    (line,) = (line for line in _lines("text") if part in line)
    _found.append(line)
    return line


def _is(line: str, quote: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, quote.split("..."))), line) is not None


def _assert_said(quote: str, text: str, **places: str) -> None:
    """Some line of `text` is the quoted one. places: NAME=real, where the quote has a name of its own."""
    for name, real in places.items():
        text = text.replace(real, name)
    assert any(_is(line, quote) for line in text.splitlines()), text


UNDONE = quoted("to undo rollout 1")
OWNED = quoted("another field manager")
ENDED = quoted("version 4  END")
OLDER = quoted("version 3  AVAILABLE")
NOT_FOUND = quoted("Servable not found")
NOT_STARTED = quoted("did not become available")
NOT_THERE = quoted("leaf directory")
TOO_LATE = quoted("no answer within")
NOT_LITERT = quoted("not in LiteRT")
UNREACHED = quoted("Connection refused")
LEFT_ALONE = quoted("it is tried again")
REFUSED = quoted("Concurrent RPC limit")
TOO_LARGE = quoted("message larger than max")
QUEUE_FULL = quoted("no more may wait")
NO_MEMORY = quoted("OOM when allocating")
BAD_CANARY = quoted("at least 0.98 needed")
NOT_COMPLETE = quoted("complete versions: none")
NOT_PUBLISHED = quoted("complete versions: 3")
NOTHING_THERE = quoted("holds no complete version")
FORBIDDEN = quoted("Forbidden")
UNREACHABLE = quoted("Could not connect to the endpoint")
PULLED = quoted("every sum as in the manifest")
WRONG_SUM = quoted("has not the sum")
FILE_GONE = quoted("is missing there")
CHANGED_HERE = quoted("--overwrite replaces it")
EXPIRED = quoted("certificate has expired")
OTHER_AUTHORITY = quoted("unable to get local issuer certificate")
HUNG_UP = quoted("Socket closed")
DATE = quoted("notAfter=")
DISK_FULL = quoted("the disk is full")
NO_IMAGE = quoted("the image cannot be decoded")


def test_every_line_that_is_quoted_is_tried() -> None:
    assert sorted(_found) == sorted(_lines("text"))


# What is to be typed


def _commands(line: str) -> list[list[str]]:
    """The words of each program that a line of shell starts, without redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word in ("|", "||", "&&", ";"):
            commands.append([])
        elif word in ("<", ">", ">>"):
            if commands[-1][-1:] == ["2"]:
                commands[-1].pop()
            next(words)
        else:
            commands[-1].append(word)
    return commands


def _typed(program: str) -> list[str]:
    """Every command of the program in the sh blocks, as it is written; once each."""
    lines = [shlex.join(words) for line in _lines("sh") for words in _commands(line) if words[0] == program]
    return list(dict.fromkeys(lines))


def _mentioned(program: str) -> list[str]:
    """Commands of the program in running text, which may leave out what does not matter there."""
    return list(dict.fromkeys(re.findall(rf"`({program} [^`]+)`", _prose())))


@pytest.mark.parametrize("line", _typed("graftserve"))
def test_graftserve_commands_can_be_read(line: str) -> None:
    command: click.Command = cli
    words = shlex.split(line)[1:]
    context = click.Context(cli, info_name="graftserve")
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        assert name is not None
        command = found
        context = click.Context(command, info_name=name, parent=context)
    if command.name == "serve":
        assert parse_args(words)
    else:
        assert command.make_context(command.name, words, parent=context.parent).params


@pytest.mark.parametrize("line", _mentioned("graftserve"))
def test_graftserve_commands_in_the_text_are_known(line: str) -> None:
    command: click.Command = cli
    words = shlex.split(line)[1:]
    context = click.Context(cli, info_name="graftserve")
    while isinstance(command, click.Group) and words:
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    known = {option for param in command.params for option in param.opts}
    assert {word for word in words if word.startswith("-")} <= known


@cache
def _kubectl_help(*words: str) -> str:
    try:
        kubectl = find_kubectl()
    except KubectlError as error:
        pytest.skip(str(error))
    done = subprocess.run([kubectl, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", [*_typed("kubectl"), *_mentioned("kubectl")])
def test_kubectl_knows_the_command_and_its_flags(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "argo":  # a plug-in
        assert words[1] == "rollouts"
        assert words[2] in {"abort", "restart"}
        assert words[3:] == ["graftserve-stable"]
        return
    if words[0] == "-n":
        assert words[1] == "graftserve"
        words = words[2:]
    if "--" in words:
        words = words[: words.index("--")]
    verb = words[:2] if words[0] in ("rollout", "top") else words[:1]
    text = _kubectl_help(*verb, "--help")
    # An unknown verb is answered with the list of commands.
    assert re.search(rf"^  kubectl {' '.join(verb)} ", text, re.MULTILINE), text
    known = set(re.findall(r"(?<!\S)--?[A-Za-z][\w-]*", text + _kubectl_help("options")))
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


def test_other_programs_are_those_that_everybody_has() -> None:
    programs = {words[0] for line in _lines("sh") for words in _commands(line)}
    assert programs == {"graftserve", "kubectl", "git", "curl", "openssl", "base64"}
    for block in _blocks():
        if block.language == "sh":
            text = "\n".join(block.lines)
            subprocess.run(["sh", "-n"], input=text, text=True, check=True, timeout=20)


# Alerts, queries, links


def _rules(name: str) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    groups = yaml.safe_load((_MONITORING / name).read_text())["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_has_its_section() -> None:
    table = {
        alert: anchor
        for alerts, anchor in re.findall(
            r"^\| (Graftserve[^|]*) \| \[.*\]\(#(.*)\) \|$", _prose(), re.MULTILINE
        )
        for alert in alerts.split(", ")
    }
    named = {rule["alert"]: rule["annotations"]["runbook"] for rule in _rules("alerts.yaml")}
    assert named == {alert: f"docs/operations.md#{anchor}" for alert, anchor in table.items()}
    assert set(table.values()) <= _anchors(_RUNBOOK)
    # Whoever comes from the page finds the alert's name there.
    for section in _prose().split("\n## ")[1:]:
        anchor = section.partition("\n")[0].lower().replace(" ", "-")
        for alert in (alert for alert, there in table.items() if there == anchor):
            assert alert in section


def test_queries_ask_for_metrics_that_exist() -> None:
    promql_parser = pytest.importorskip("promql_parser", reason="needs promql-parser")
    from prometheus_client import CollectorRegistry

    from graftserve.client.prometheus import PrometheusHooks
    from tests.serving.containers import METRICS

    registry = CollectorRegistry()
    hooks = PrometheusHooks(registry=registry)
    with FakeServer() as server, Client(server.target, "flowers", hooks=hooks) as client:
        hooks.watch(client)
        client.classify(b"an image")
        own = {sample.name for metric in registry.collect() for sample in metric.samples}
        own |= {metric.name + suffix for metric in registry.collect() for suffix in ("_total", "")}
    recorded = {rule["record"] for rule in _rules("recording-rules.yaml")}
    known = {*METRICS, *recorded, *own}
    asked: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            asked.add(node.name)

    queries = [" ".join(block.lines) for block in _blocks() if block.language == "promql"]
    queries += re.findall(r"`((?:rate\()?graftserve[_:][^`]+)`", _prose())
    assert len(queries) > 10
    for query in queries:
        promql_parser.walk(promql_parser.parse(query), visit)
    # From kube-state-metrics and the kubelet.
    assert {name for name in asked if not name.startswith(("kube_", "container_"))} <= known


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", _prose())
    assert len(links) > 20
    for link in links:
        file, _, anchor = link.partition("#")
        target = _RUNBOOK.parent / file if file else _RUNBOOK
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target), link
    linked = {link.removeprefix("#") for link in links if link.startswith("#")}
    sections = {block.section for block in _blocks()} - {""}
    assert {section.lower().replace(" ", "-") for section in sections} <= linked
    for other in ("README.md", "docs/kubernetes.md"):
        assert "operations.md)" in (_ROOT / other).read_text(encoding="utf-8")


# Real servers


@pytest.fixture
def graftserve(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """graftserve(*args) -> (exit status, stdout, stderr), in this process."""

    def graftserve(*args: str | Path) -> tuple[int, str, str]:
        status = _run([str(arg) for arg in args])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return graftserve


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SavedModels that classify by the size of the image, to copy: good, and permuted, with other labels."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("saved")

    class Flowers(tf.Module):
        def __init__(self, labels: Sequence[str]) -> None:
            super().__init__()
            self.labels = tf.constant(labels)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
        def classify(self, image_bytes: Any) -> dict[str, Any]:
            length = tf.strings.length(image_bytes)
            order = (length[:, None] + tf.range(3)[None, :]) % 3
            return {
                "classes": tf.gather(self.labels, order),
                "scores": tf.tile(tf.constant([[0.7, 0.2, 0.1]]), [tf.shape(length)[0], 1]),
                "valid": tf.strings.substr(image_bytes, 0, 2) == _JPEG,
            }

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="rounds")])
        def spin(self, rounds: Any) -> dict[str, Any]:
            return {"y": tf.while_loop(lambda i: i < rounds, lambda i: [i + 1], [tf.constant(0)])[0]}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int64, name="size")])
        def fill(self, size: Any) -> dict[str, Any]:
            return {"y": tf.fill([size], 1.0)}

    for name, labels in {"good": ("daisy", "rose", "tulip"), "permuted": ("rose", "tulip", "daisy")}.items():
        model = Flowers(labels)
        signatures = {"serving_default": model.classify, "spin": model.spin, "fill": model.fill}
        tf.saved_model.save(model, str(root / name), signatures=signatures)
        (root / name / "assets.extra").mkdir()
        write_manifest(root / name)
    return root


@pytest.fixture
def models(saved: Path, tmp_path: Path) -> Path:
    """The folder of "flowers": version 3, good."""
    shutil.copytree(saved / "good", tmp_path / "flowers/3")
    return tmp_path / "flowers"


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """start_server(policy, labels, **flags) -> a server of "flowers" in the test's folder."""
    servers: list[Server] = []

    def start(policy: str = "latest {}", labels: str = "", **flags: Any) -> Server:
        config = tmp_path / "models.config"
        config.write_text(
            f'model_config_list {{ config {{ name: "flowers" base_path: "{tmp_path / "flowers"}"\n'
            f"    model_version_policy {{ {policy} }}\n    {labels}\n}} }}\n"
        )
        given = {
            "host": "localhost",
            "port": 0,
            "max_num_load_retries": 0,
            "allow_version_labels_for_unavailable_models": True,
        }
        servers.append(Server(Options(model_config_file=str(config), **given | flags)))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop(0)


def _target(server: Server) -> str:
    return f"localhost:{server.grpc_port}"


def _break(models: Path, saved: Path) -> None:
    """Add a version 4 that cannot be loaded."""
    shutil.copytree(saved / "good", models / "4")
    (models / "4/saved_model.pb").write_bytes(b"no model")


def _eventually(call: Callable[[], Any], kind: type[ClientError], part: str, timeout_s: float = 30) -> str:
    """The text of the first error with `part` in it; the call may end otherwise before that."""
    deadline = time.monotonic() + timeout_s
    seen: ClientError | None = None
    while time.monotonic() < deadline:
        try:
            call()
        except kind as error:
            seen = error
            if part in str(error):
                return str(error)
    pytest.fail(f"expected an error with {part!r}, the last was: {seen}")


def test_a_broken_version_ends_beside_the_older_one(
    models: Path, saved: Path, start_server: Callable[..., Server], graftserve: Any
) -> None:
    _break(models, saved)
    server = start_server("all {}")

    def has_ended() -> bool:
        states = {state.id.version: state.state for state in server.manager.states("flowers")}
        return states.get(4) is State.END

    assert server.manager.wait_until(has_ended, 60)
    status, out, _ = graftserve("status", "--target", _target(server), "--model", "flowers")
    assert status == 0
    ended, older = out.splitlines()
    assert _is(ended, ENDED)
    assert older == OLDER
    with Client(_target(server), "flowers", version=4) as client, pytest.raises(NotFoundError) as told:
        client.classify(_JPEG)
    assert _is(str(told.value), NOT_FOUND)


@pytest.fixture
def said_by_server(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[Path, str], str]]:
    """said_by_server(folder, policy) -> the last line of a server that cannot start with that."""

    def said(models: Path, policy: str) -> str:
        config = models.parent / "models.config"
        config.write_text(
            f'model_config_list {{ config {{ name: "flowers" base_path: "{models}" '
            f"model_version_policy {{ {policy} }} }} }}"
        )
        caplog.clear()
        options = Options(
            model_config_file=str(config), port=0, rest_api_port=0, host="localhost", max_num_load_retries=0
        )
        assert run(options) == 1
        return caplog.messages[-1]

    with caplog.at_level(logging.INFO, "graftserve"):
        yield said
    gc.unfreeze()  # a server's process keeps what it began with; this one goes on


def test_a_server_that_cannot_start_says_why(models: Path, saved: Path, said_by_server: Any) -> None:
    _assert_said(NOT_THERE, said_by_server(models, "specific { versions: 5 }"), **{"/models": str(models)})
    _break(models, saved)
    _assert_said(NOT_STARTED, said_by_server(models, "specific { versions: 4 }"))


def test_a_server_that_is_gone_and_back(models: Path, start_server: Callable[..., Server]) -> None:
    server = start_server()
    port = server.grpc_port
    with Client(f"localhost:{port}", "flowers") as client:
        assert client.classify(_JPEG).version == 3
        server.stop(0)
        with pytest.raises(UnavailableError) as told:
            client.classify(_JPEG)
        assert _is(str(told.value), UNREACHED)
        text = _eventually(lambda: client.classify(_JPEG), UnavailableError, "it is tried again in")
        assert _is(text, LEFT_ALONE)
        start_server(port=port)
        assert client.wait_until_ready(timeout_s=30) == 3, "it finds the server again by itself"


def test_more_calls_than_threads_and_queue(models: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(grpc_max_threads=1, max_queued_requests=1)

    def spin(_: int) -> str:
        with Client(_target(server), "flowers") as client:
            try:
                client.predict({"rounds": np.int32(2**31 - 1)}, signature="spin", timeout_s=2)
            except (OverloadedError, DeadlineExceededError) as error:
                return str(error)
        return "an answer"

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(spin, range(6)))
    assert sum(_is(text, REFUSED) for text in told) == 4, told
    # The server may be the first to say that the time is over, in its own words.
    assert any(_is(text, TOO_LATE) for text in told), told
    with Client(_target(server), "flowers") as client:
        assert client.wait_until_ready(timeout_s=30) == 3  # the last one is counted when the next call comes
    counted = b':tensorflow:serving:request_count{model_name="(unknown)",status="RESOURCE_EXHAUSTED"}'
    assert counted in server.metrics.render()


def test_an_image_above_the_limit(models: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(max_message_bytes=10_000)
    with Client(_target(server), "flowers") as client, pytest.raises(InvalidArgumentError) as told:
        client.classify(_JPEG + bytes(20_000))
    assert _is(str(told.value), TOO_LARGE)


def test_more_than_may_wait_in_the_client() -> None:
    with (
        FakeServer("flowers", answer=lambda image: "rose") as server,
        Client(server.target, "flowers", max_in_flight=1, max_queued_images=1) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        with server.holding():
            first = pool.submit(client.classify, b"first")
            server.wait_for_predicts(1)
            second = pool.submit(client.classify, b"second")
            deadline = time.monotonic() + 30
            while client.stats().queued < 1:
                assert time.monotonic() < deadline
            with pytest.raises(OverloadedError) as told:
                client.classify(b"third")
        assert _is(str(told.value), QUEUE_FULL)
        assert first.result().label == second.result().label == "rose"


@pytest.mark.slow  # TensorFlow waits ten seconds for somebody to free memory
def test_out_of_memory_is_told_in_tensorflows_words(
    models: Path, start_server: Callable[..., Server]
) -> None:
    """On the CPU: more than any machine can address."""
    server = start_server()
    with Client(_target(server), "flowers") as client, pytest.raises(OverloadedError) as told:
        client.predict({"size": np.int64(2**46)}, signature="fill")
    _assert_said(NO_MEMORY, str(told.value))
    assert b'status="RESOURCE_EXHAUSTED"' in server.metrics.render()


def test_an_image_that_is_none(models: Path, start_server: Callable[..., Server]) -> None:
    server = start_server()
    with Client(_target(server), "flowers") as client:
        with pytest.raises(InvalidImageError) as told:
            client.classify(b"<html>404</html>")
        assert client.classify(_JPEG).label in {"daisy", "rose", "tulip"}
    assert str(told.value) == NO_IMAGE
    assert b"graftserve_invalid_rows_total" in server.metrics.render()


def test_all_addresses_of_a_target_are_asked_in_turn() -> None:
    with FakeServer(host="127.0.0.1") as one, FakeServer(host="127.0.0.1") as other:
        with Client(f"ipv4:127.0.0.1:{one.port},127.0.0.1:{other.port}", "flowers") as client:
            for number in range(40):
                client.classify(b"%d" % number)
        assert min(len(one.images), len(other.images)) >= 10


def test_the_manifests_say_what_the_runbook_expects_of_them() -> None:
    (age,) = re.findall(r"must show `(.*)`", _prose())
    for path in ("base/pod/deployment.yaml", "components/embedded/server.yaml"):
        assert f"{age}," in (_ROOT / "k8s" / path).read_text()
    pod = (_ROOT / "k8s/base/pod/deployment.yaml").read_text()
    assert "4Gi for `models`" in _prose()
    assert "sizeLimit: 4Gi" in pod
    names = set(re.findall(r"`([A-Z_]+)=", _prose()))
    files = "".join(path.read_text() for path in (_ROOT / "k8s/overlays/production").glob("*.env"))
    assert names == {"REPLICAS", "WEIGHT", "STABLE_WEIGHT"}
    assert all(f"{name}=" in files for name in names)


# Rollouts outside Kubernetes


def test_a_bad_canary_is_taken_back_and_a_promoted_one_undone(
    models: Path,
    saved: Path,
    start_server: Callable[..., Server],
    graftserve: Any,
    photos: dict[str, Any],
    encode: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    shutil.copytree(saved / "permuted", models / "4")
    server = start_server("specific { versions: 3 }", 'version_labels { key: "stable" value: 3 }')
    (tmp_path / "photos").mkdir()
    for name, pixels in photos.items():
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(encode(pixels[:100, :100]))
    place = (
        "--target",
        _target(server),
        "--model",
        "flowers",
        "--model-config-file",
        tmp_path / "models.config",
    )
    start = ("rollout", "start", *place, "--version", "4", "--auto", "--drain-s", "0")

    def stable() -> int:
        with Client(_target(server), "flowers", version_label="stable") as client:
            return client.classify(_JPEG).version

    status, out, _ = graftserve(*start, "--images", tmp_path / "photos", "--state", tmp_path / "aborted.json")
    assert status == 1
    _assert_said(BAD_CANARY, out)
    assert stable() == 3

    state = ("--state", tmp_path / "promoted.json")
    assert graftserve(*start, "--skip-comparison", *state)[0] == 0
    assert stable() == 4
    status, out, _ = graftserve("rollout", "undo", *place, *state, "--drain-s", "0")
    assert status == 0
    _assert_said(UNDONE, out)
    assert stable() == 3


# Rollouts on Kubernetes


def test_a_version_that_kubectl_rolled_back_is_taken_over(
    graftserve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = copy_small_overlay(tmp_path / "deploy", "flowers")
    place = ("--overlay", overlay)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with FakeApi(ready=True) as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
        start = ("rollout", "start", *place, "--skip-comparison", "--auto", "--apply")
        assert graftserve(*start, "--version", "4")[0] == 0
        template = {"spec": {"template": {"metadata": {"labels": {"graftserve.dev/version": "3"}}}}}
        api.edit("Deployment", "graftserve-stable", "flowers", template, "kubectl")
        assert graftserve("rollout", "undo", *place, "--apply")[0] == 0
        status, _, err = graftserve(*start, "--version", "5")
        assert status == 1
        _assert_said(OWNED, err)
        assert graftserve("rollout", "apply", *place, "--take-over", "kubectl")[0] == 0
        assert graftserve(*start, "--version", "5")[0] == 0


# Stores, sums and disks


@pytest.fixture
def store(saved: Path) -> Iterator[Store]:
    """A store that has version 3 of flowers."""
    store = open_store("memory://test_operations/flowers")
    store.publish(saved / "good", 3)
    yield store
    fsspec.filesystem("memory").rm("/test_operations", recursive=True)


@pytest.fixture
def pull(graftserve: Any, tmp_path: Path) -> Callable[..., str]:
    """pull(url, *options) -> what an init container's log would say, whether it failed or not."""

    def pull(url: str, *options: str) -> str:
        status, out, err = graftserve("pull", url, tmp_path / "pod", *options)
        assert (status == 0) == ("Error: " not in err)
        return (out + err).replace(url, "s3://models/flowers").replace(str(tmp_path / "pod"), "/models")

    return pull


def test_a_bucket_that_is_gone_and_back(pull: Callable[..., str], store: Store, tmp_path: Path) -> None:
    _assert_said(NOT_COMPLETE, pull("memory://gone/flowers", "--version=3"))
    _assert_said(NOTHING_THERE, pull("memory://gone/flowers"))
    _assert_said(NOT_COMPLETE, pull(str(tmp_path / "gone/flowers"), "--version=3"))
    _assert_said(PULLED, pull(store.url, "--version=3"))


def test_a_rollout_to_a_version_that_is_not_in_the_bucket(
    graftserve: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    overlay = copy_manifests("production", tmp_path / "deploy")
    text = f"MODEL_NAME=flowers\nMODEL_SOURCE={store.url}\nMODEL_VERSION=3\n"
    (overlay / "stable.env").write_text(text)
    status, out, _ = graftserve("rollout", "start", "--overlay", overlay, "--version", "4")
    assert status == 1
    _assert_said(NOT_PUBLISHED, out.replace(store.url, "s3://models/flowers"))
    assert (overlay / "stable.env").read_text() == text


class _Refusing(BaseHTTPRequestHandler):
    """Answers as S3 does, with the status and code of the server's `refusal`."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        _, code = self.server.refusal
        self._answer(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(self.server.refusal[0])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("refusal", "quote"), [((404, "NoSuchBucket"), NOT_COMPLETE), ((403, "AccessDenied"), FORBIDDEN)]
)
def test_s3_refuses(refusal: tuple[int, str], quote: str, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    server.refusal = refusal
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        _assert_said(quote, _pull_from_s3(server.server_port, tmp_path))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow  # s3fs tries for 20 seconds
def test_s3_is_away(tmp_path: Path) -> None:
    _assert_said(UNREACHABLE, _pull_from_s3(9, tmp_path))  # the discard service, which nobody runs


def _pull_from_s3(port: int, tmp_path: Path) -> str:
    """What the pull says; in a process of its own, since s3fs leaves threads behind."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    (line,) = (line for line in _typed("graftserve") if "/tmp/flowers --version 3" in line)
    words = [str(tmp_path / "flowers") if word == "/tmp/flowers" else word for word in shlex.split(line)]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "graftserve.cli", *words[1:]],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    return done.stderr


def test_a_file_that_was_changed_in_the_store(pull: Callable[..., str], store: Store) -> None:
    path = store.path(3, "saved_model.pb")
    content = store.filesystem.cat_file(path)
    store.filesystem.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    _assert_said(WRONG_SUM, pull(store.url, "--version=3"))
    store.filesystem.rm_file(path)
    _assert_said(FILE_GONE, pull(store.url, "--version=3"))


def test_a_file_that_was_changed_on_the_volume(
    pull: Callable[..., str], store: Store, tmp_path: Path
) -> None:
    _assert_said(PULLED, pull(store.url, "--version=3"))
    with (tmp_path / "pod/3/saved_model.pb").open("ab") as file:
        file.write(b"\0")
    _assert_said(CHANGED_HERE, pull(store.url, "--version=3"))
    _assert_said(PULLED, pull(store.url, "--version=3", "--overwrite"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full(pull: Callable[..., str], store: Store, tmp_path: Path) -> None:
    work = tmp_path / "pod/.pulling-3"
    work.mkdir(parents=True)
    (work / "saved_model.pb").symlink_to("/dev/full")
    _assert_said(DISK_FULL, pull(store.url, "--version=3"))
    (work / "saved_model.pb").unlink()
    _assert_said(PULLED, pull(store.url, "--version=3"))


# Certificates


def test_a_certificate_that_expired_and_its_renewal(
    models: Path, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    authority = trustme.CA()
    secret = tmp_path / "secret"
    secret.mkdir()

    def start(not_after: datetime.datetime | None, port: int) -> Server:
        certificate = authority.issue_cert("localhost", not_after=not_after)
        (secret / "tls.key").write_bytes(certificate.private_key_pem.bytes())
        (secret / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        script = _ROOT / "k8s/components/tls/ssl_config.py"
        file = tmp_path / "ssl.config"
        subprocess.run([sys.executable, script, secret, file], check=True, timeout=20)
        return start_server(ssl_config_file=str(file), port=port)

    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    server = start(yesterday, 0)
    port = server.grpc_port
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with closing(Client(f"localhost:{port}", "flowers", credentials=credentials)) as client:
        with pytest.raises(UnavailableError) as told:
            client.classify(_JPEG)
        assert _is(str(told.value), EXPIRED)
        (expired,) = _dates(port)
        server.stop(0)
        start(None, port)
        assert client.wait_until_ready(timeout_s=30) == 3
        (renewed,) = _dates(port)
    assert _is(expired, DATE)
    assert expired != renewed


def test_what_looks_like_an_expired_certificate() -> None:
    authority = trustme.CA()
    root = authority.cert_pem.bytes()
    certificate = authority.issue_cert("localhost")
    pair = [(certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())]
    late = authority.issue_cert("caller", not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    expired = grpc.ssl_channel_credentials(
        root, late.private_key_pem.bytes(), late.cert_chain_pems[0].bytes()
    )

    def told(server: FakeServer, credentials: grpc.ChannelCredentials | None) -> str:
        client = Client(f"localhost:{server.port}", "flowers", credentials=credentials)
        with client, pytest.raises(UnavailableError) as error:
            client.classify(_JPEG)
        return str(error.value)

    with FakeServer(host="localhost", credentials=grpc.ssl_server_credentials(pair)) as server:
        other = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
        assert _is(told(server, other), OTHER_AUTHORITY)
        assert _is(told(server, None), HUNG_UP)
    mutual = grpc.ssl_server_credentials(pair, root, True)
    with FakeServer(host="localhost", credentials=mutual) as server:
        assert _is(told(server, expired), HUNG_UP)


def _dates(port: int) -> list[str]:
    """What the runbook's command prints, of a server at this port."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    (line,) = (line for line in _lines("sh") if line.startswith("openssl s_client"))
    assert "localhost:8500" in line
    command = line.replace("localhost:8500", f"localhost:{port}")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.splitlines()


# LiteRT


@pytest.mark.slow
def test_a_version_whose_lite_network_is_damaged_runs_in_tensorflow(
    exported: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = tmp_path / "flowers"
    shutil.copytree(exported.path, models / "4")
    network = models / "4/assets.extra/network.tflite"
    network.write_bytes(network.read_bytes()[:1000])
    options = Options(model_name="flowers", model_base_path=str(models), host="localhost", port=0)
    server = Server(options)
    with caplog.at_level(logging.INFO, "graftserve"):
        server.start()
    try:
        _assert_said(NOT_LITERT, "\n".join(caplog.messages))
        assert b'engine="tensorflow"' in server.metrics.render()
    finally:
        server.stop(0)
