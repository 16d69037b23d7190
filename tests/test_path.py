"""The whole path as a user walks it: processes, ports, signals and files, on real images."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftserve.cli.server_process import ServerProcess
from graftserve.client import (
    Client,
    ClientError,
    InvalidImageError,
    Prediction,
    RetryPolicy,
    VersionState,
)

MODEL = "digits"


@pytest.fixture
def serve() -> Iterator[Callable[..., ServerProcess]]:
    servers: list[ServerProcess] = []

    def serve(base_path: Path, *flags: str) -> ServerProcess:
        servers.append(ServerProcess(MODEL, base_path, *flags))
        return servers[-1]

    yield serve
    for server in servers:
        server.end()


@pytest.fixture
def models(exported: Any, tmp_path: Path) -> Path:
    """A model folder of its own, with version 1."""
    base = tmp_path / "models" / MODEL
    shutil.copytree(exported.path, base / "1")
    return base


def command(*args: object) -> subprocess.CompletedProcess[str]:
    """Run graftserve in a process of its own."""
    line = [sys.executable, "-m", "graftserve.cli", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_images_to_served_predictions(serve, models: Path, trained: Any, tmp_path: Path, capsys) -> None:
    server = serve(models, "--rest_api_port=-1")
    addresses = server.addresses()
    target = addresses["gRPC"]
    files = [golden.file for golden in trained.goldens]
    expected = np.array([golden.probabilities for golden in trained.goldens])
    best = [trained.labels[row.argmax()] for row in expected]

    broken = tmp_path / "broken.jpg"
    broken.write_bytes(files[0].read_bytes()[:300])
    done = command(
        "classify", "--target", target, "--model", MODEL, "--json", files[0], broken, *files[1:], "no.jpg"
    )
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("label") for row in rows] == [best[0], None, *best[1:], None]
    assert "broken.jpg: " in done.stderr
    assert "no.jpg: expected a readable image file" in done.stderr
    assert "2 of 10 images could not be classified" in done.stderr
    assert "Traceback" not in done.stderr

    done = command("status", "--target", target, "--model", MODEL, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["versions"] == [
        {"version": 1, "state": "AVAILABLE", "error_code": "OK", "error_message": ""}
    ]
    done = command("status", "--target", target, "--model", "nope")
    assert done.returncode == 1
    assert "Could not find any versions of model nope" in done.stderr

    with Client(target, MODEL) as client:
        images = [file.read_bytes() for file in files]
        results = client.classify_many([images[0], b"no image", *images[1:]])
        assert isinstance(results.pop(1), InvalidImageError)
        assert [result.label for result in results if isinstance(result, Prediction)] == best
        assert client.classify(images[0]).score == pytest.approx(expected[0].max(), abs=1e-5)
        assert client.embed(images).shape == (8, 1280)
        full = client.predict({"image_bytes": np.array(images, object)})
        np.testing.assert_allclose(full["probabilities"], expected, atol=1e-5)
        assert set(client.metadata().signatures) >= {"serving_default", "features"}

    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    example = example.replace("localhost:8500", target).replace("flowers", MODEL)
    for name, file in (("photo.jpg", files[0]), ("a.jpg", files[1]), ("b.jpg", files[2])):
        example = example.replace(f'"{name}"', repr(str(file)))
    exec(compile(example, "README.md", "exec"), scope := {"paths": [*files, broken]})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[::2] == [best[0], "1"]
    assert [line.split(":")[0] for line in printed[1:]] == ["skipped"]
    assert scope["vectors"].shape == (2, 1280)

    body = {"instances": [{"image_bytes": {"b64": b64encode(image).decode()}} for image in images]}
    url = f"http://{addresses['REST']}/v1/models/{MODEL}"
    request = urllib.request.Request(f"{url}:predict", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        predictions = json.load(response)["predictions"]
    np.testing.assert_allclose([row["probabilities"] for row in predictions], expected, atol=1e-5)
    assert [row["classes"][0] for row in predictions] == best
    with urllib.request.urlopen(url, timeout=60) as response:
        assert json.load(response)["model_version_status"][0]["state"] == "AVAILABLE"

    assert server.end() == 0


def test_a_new_version_takes_over_without_a_lost_request(serve, models: Path, trained: Any) -> None:
    target = serve(models).addresses()["gRPC"]
    image = trained.goldens[0].file.read_bytes()
    answers: Counter[int] = Counter()
    errors: list[ClientError] = []
    swapped, stop = threading.Event(), threading.Event()

    def ask() -> None:
        last = 0
        with Client(target, MODEL, retry=RetryPolicy(max_attempts=1)) as client:
            while not stop.is_set():
                try:
                    version = client.classify(image).version
                except ClientError as error:
                    errors.append(error)
                    return
                assert version >= last
                last = version
                answers[version] += 1
                if version == 2 and answers[2] > 20:
                    swapped.set()

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    shutil.copytree(models / "1", models / ".incoming")
    (models / ".incoming").rename(models / "2")
    assert swapped.wait(90), (answers, errors)
    stop.set()
    for caller in callers:
        caller.join()
    assert not errors
    with Client(target, MODEL) as client:
        states = {status.version: status.state for status in client.status()}
    assert states == {2: VersionState.AVAILABLE, 1: VersionState.END}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the server's CPU time from /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_stop_finishes_what_is_under_way(serve, models: Path, trained: Any, number: signal.Signals) -> None:
    server = serve(models)
    target = server.addresses()["gRPC"]
    images = [golden.file.read_bytes() for golden in trained.goldens] * 12
    results: list[Any] = []
    sent = threading.Event()

    def source() -> Iterator[bytes]:
        yield from images
        sent.set()  # the one request that holds them all goes out now

    def cpu_s() -> float:
        fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask() -> None:
        with Client(target, MODEL, retry=RetryPolicy(max_attempts=1), max_batch_images=len(images)) as client:
            results.extend(client.classify_many(source()))

    with Client(target, MODEL) as warm:
        warm.classify(images[0])
    idle_cpu_s = cpu_s()
    caller = threading.Thread(target=ask)
    caller.start()
    assert sent.wait(10)
    while caller.is_alive() and cpu_s() < idle_cpu_s + 0.3:  # until the server is at work on it
        time.sleep(0.02)
    assert server.end(number) == 0
    caller.join(30)
    assert len(results) == len(images)
    assert all(isinstance(result, Prediction) for result in results)
    with (
        Client(target, MODEL, retry=RetryPolicy(max_attempts=1), timeout_s=2) as late,
        pytest.raises(ClientError),
    ):
        late.status()


@pytest.mark.slow
def test_a_server_that_comes_back_is_found(serve, models: Path, trained: Any) -> None:
    image = trained.goldens[0].file
    first = serve(models)
    target = first.addresses()["gRPC"]
    with Client(target, MODEL) as client:
        assert client.classify(image).version == 1
        first.end()
        again = serve(models, f"--port={target.rpartition(':')[2]}")
        client.wait_until_ready(timeout_s=60)
        assert client.classify(image).version == 1
        assert again.end() == 0


@pytest.mark.slow
def test_what_the_server_refuses_to_start_with(serve, models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "saved_model.pb").write_bytes(b"no graph")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ("none", (), "Could not find base path"),
            ("empty", (), "Did you forget to name your leaf directory as a number"),
            (
                "broken",
                ("--max_num_load_retries=0",),
                "1 servable(s) did not become available: model digits version 1",
            ),
            ("models/digits", (f"--port={port}",), str(port)),
            ("models/digits", (f"--rest_api_port={port}",), str(port)),
        ]
        for folder, flags, message in cases:
            server = serve(tmp_path / folder, *flags)
            assert server.wait() == 1, server.log
            assert any("could not start" in line and message in line for line in server.log), server.log
            assert not any("Traceback" in line for line in server.log), server.log


def test_the_client_process_never_imports_tensorflow(serve, models: Path, trained: Any) -> None:
    target = serve(models).addresses()["gRPC"]
    code = (
        "import sys\nfrom graftserve.client import Client\n"
        f"with Client({target!r}, {MODEL!r}) as client:\n"
        f"    label = client.classify({str(trained.goldens[0].file)!r}).label\n"
        "print(label, sorted({'tensorflow', 'keras', 'scipy', 'sklearn', 'h5py'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert done.stdout.split() == [trained.goldens[0].label, "[]"]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_demo_does_all_of_it(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "graftserve.cli", "demo", "--work-dir", str(tmp_path), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["test_accuracy"] >= 0.95
    assert result["served_accuracy"] == result["test_accuracy"]
    assert result["rollout_failed"] == 0
    assert set(result["rollout_answers_by_version"]) == {"1", "2"}
