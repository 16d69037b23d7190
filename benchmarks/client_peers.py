"""The client against others that ask TensorFlow Serving or its like, each in an environment of its own.

    python benchmarks/client_peers.py --output benchmarks/results

tensorflow-serving-api with TensorFlow's make_tensor_proto, min-tfs-client, ovmsclient, tritonclient[grpc]
(which speaks KServe's protocol instead), messages generated from the .proto files and filled by hand, and
`graftserve.client`, from the wheel in build/wheel:

- import: of what a program imports to send a request, bytecode cached: seconds, and memory of the process;
- install: megabytes without bytecode, and packages, with their dependencies;
- encode: 32 images of 100 KB into the bytes of a request, in CPU time, and whether the images in it are
  those that were given;
- decode: the bytes of an answer of 32 rows into lists of labels, scores and validity, in CPU time.

Environments are made in build/peers with pip on the first run. A client that does not install or fails has
an error in the result instead of numbers. The rounds take the clients in turn, each measurement in a new
process. Ratios are each client's cost to that of `graftserve.client` in the same round: above 1, ours is
cheaper.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environments import Environment, PeerError, environ, last_error, make_environment
from peers.client_codec import IMAGES, jpegs
from result import ratios, write_result

from graftserve.client.wire import PredictRequest, PredictResponse
from graftserve.client.wire.tensors import to_proto, write_typed

OURS = "graftserve.client"
CLASSES = 5
_ROOT = Path(__file__).parents[1]
_CLIENT = Path(__file__).with_name("peers") / "client_codec.py"
_IMPORT = """
import json, re, time, warnings
warnings.simplefilter("ignore")
started = time.perf_counter()
{code}
taken = time.perf_counter() - started
with open("/proc/self/status") as file:
    print(json.dumps([taken, int(re.search(r"VmRSS:\\s+(\\d+) kB", file.read())[1]) / 1024]))
"""


@dataclass(frozen=True)
class Peer:
    """requirements: as pip takes them. code: what a program imports to send a request."""

    requirements: tuple[str, ...]
    code: str


PEERS = {
    "raw stubs": Peer(("grpcio", "protobuf"), "import grpc; from stubs import prediction_pb2"),
    "tensorflow-serving-api": Peer(
        ("tensorflow-serving-api",),
        "import grpc; from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc\n"
        "from tensorflow import make_ndarray, make_tensor_proto",
    ),
    "min-tfs-client": Peer(
        ("min-tfs-client", "protobuf<4"),  # what it was generated for
        "from min_tfs_client.requests import TensorServingClient",
    ),
    "ovmsclient": Peer(("ovmsclient",), "from ovmsclient import make_grpc_client"),
    "tritonclient": Peer(("tritonclient[grpc]",), "from tritonclient.grpc import InferenceServerClient"),
}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each client in each round")
    parser.add_argument("--peer", choices=PEERS, nargs="+", default=list(PEERS), help="default: all")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    environments = {OURS: our_environment()} | {name: _environment(name) for name in arguments.peer}
    codes = {OURS: "from graftserve.client import Client"} | {
        name: PEERS[name].code for name in arguments.peer
    }
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        write_answer(work_dir)
        clients = {
            name: _Client(name, environment, codes[name], work_dir)
            for name, environment in environments.items()
        }
        for client in clients.values():
            client.prepare()
        for _ in range(arguments.rounds):
            for client in clients.values():
                client.measure(arguments.seconds)
    result = {
        "ratios_to_graftserve": {
            name: client.ratios(clients[OURS]) for name, client in clients.items() if name != OURS
        },
        "clients": {name: client.summary() for name, client in clients.items()},
    }
    print(json.dumps(result, indent=2))
    write_result(arguments.output, "client_peers", result, rounds=arguments.rounds)


def our_environment() -> Environment:
    wheels = sorted((_ROOT / "build" / "wheel").glob("*.whl"))
    if not wheels:
        raise SystemExit("expected a wheel in build/wheel; make .venv/installed builds it")
    return make_environment("graftserve-client", [str(wheels[-1])])


def _environment(name: str) -> Environment:
    environment = make_environment(name.replace(" ", "-"), PEERS[name].requirements)
    if name != "raw stubs" or environment.error or (environment.site_packages / "stubs").exists():
        return environment
    compiler = make_environment("grpcio-tools", ["grpcio-tools"])
    error = compiler.error or _generate(compiler, environment.site_packages)
    return Environment(name, environment.path, environment.packages, error)


def _generate(compiler: Environment, folder: Path) -> str:
    """Classes for our messages, as anybody makes them who has the .proto files; returns what went wrong."""
    with tempfile.TemporaryDirectory() as sources:
        names = ("prediction.proto", "tensor.proto")
        for name in names:
            text = (_ROOT / "client" / "wire" / name).read_text()
            (Path(sources) / "stubs").mkdir(exist_ok=True)
            (Path(sources) / "stubs" / name).write_text(text.replace("graftserve/client/wire/", "stubs/"))
        command = [compiler.python, "-m", "grpc_tools.protoc", f"-I{sources}", f"--python_out={folder}"]
        command += [f"stubs/{name}" for name in names]
        done = subprocess.run(list(map(str, command)), env=environ(), capture_output=True, text=True)
    return last_error(done.stderr) if done.returncode else ""


def write_answer(folder: Path) -> None:
    source = np.random.default_rng(1)
    labels = [[f"label {source.integers(1000)}" for _ in range(CLASSES)] for _ in range(IMAGES)]
    scores = source.random((IMAGES, CLASSES), np.float32)
    answer = PredictResponse()
    answer.outputs["classes"].CopyFrom(to_proto(np.array(labels, object)))
    write_typed(scores, answer.outputs["scores"])
    write_typed(np.ones(IMAGES, np.bool_), answer.outputs["valid"])
    (folder / "answer.bin").write_bytes(answer.SerializeToString())
    values = [list(itertools.chain(*labels)), scores.ravel().tolist(), [True] * IMAGES]
    (folder / "answer.json").write_text(json.dumps(values))


class _Client:
    """What one client costs, round by round; `failed` says what it cannot do, and why."""

    def __init__(self, name: str, environment: Environment, code: str, folder: Path) -> None:
        self._name, self._environment, self._folder = name, environment, folder
        self._import = _IMPORT.format(code=code)
        self._taken: dict[str, list[float]] = {
            key: [] for key in ("import_s", "memory_mib", "encode_ms", "decode_us")
        }
        self._right: dict[str, bool] = {}
        self.failed: dict[str, str] = {"install": environment.error} if environment.error else {}

    def prepare(self) -> None:
        """Once, for the bytecode."""
        if not self.failed:
            self._try("import", lambda: self._environment.run("-c", self._import))

    def measure(self, seconds: float) -> None:
        if {"install", "import"} & set(self.failed):
            return
        taken = self._try("import", lambda: self._environment.run("-c", self._import))
        if taken:
            self._taken["import_s"].append(taken[0])
            self._taken["memory_mib"].append(taken[1])
        for what, key, scale in (("encode", "encode_ms", 1e3), ("decode", "decode_us", 1e6)):
            command = (_CLIENT, self._name, what, self._folder, "--seconds", seconds)
            done = self._try(what, lambda command=command: self._environment.run(*command))
            if done:
                self._taken[key].append(done["cpu_s"] * scale)
                self._right[what] = done["right"] if what == "decode" else self._holds_the_images()

    def _try(self, what: str, call: Callable[[], Any]) -> Any:
        if what not in self.failed:
            try:
                return call()
            except PeerError as exc:
                self.failed[what] = str(exc)
        return None

    def _holds_the_images(self) -> bool:
        content = (self._folder / "request.bin").read_bytes()
        if self._name == "tritonclient":  # no message of ours; each image comes after its length
            return all(len(image).to_bytes(4, "little") + image in content for image in jpegs()[0])
        return list(PredictRequest.FromString(content).inputs["image_bytes"].string_val) == jpegs()[0]

    def summary(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            key: round(statistics.median(taken), 3) for key, taken in self._taken.items() if taken
        }
        if not self._environment.error:
            values["installed_mb"] = round(self._environment.installed_mb(), 1)
            values["packages"] = len(self._environment.packages)
            values["versions"] = {
                name: version
                for name, version in self._environment.packages.items()
                if name in ("grpcio", "numpy", "protobuf", "tensorflow") or name.lower() == self._name
            }
        values |= {f"{what}_right": right for what, right in self._right.items()}
        return values | ({"error": self.failed} if self.failed else {})

    def ratios(self, ours: "_Client") -> dict[str, Any]:
        values: dict[str, Any] = {
            key.rpartition("_")[0]: ratios(taken, ours._taken[key])
            for key, taken in self._taken.items()
            if taken and len(taken) == len(ours._taken[key])
        }
        if not self._environment.error:
            installed = (self._environment.installed_mb(), ours._environment.installed_mb())
            values["installed"] = round(installed[0] / installed[1], 3)
            values["packages"] = round(len(self._environment.packages) / len(ours._environment.packages), 3)
        return values


if __name__ == "__main__":
    main()
