"""What no server can beat on this machine, and how much of it the embedded server gives.

    python benchmarks/limits.py --output benchmarks/results

On one exported EfficientNet-Lite0, each by itself, on one CPU and on all of them, for a photograph of 500
pixels and one of 12 megapixels:

- network: network.tflite in an interpreter of one thread for each CPU, network.int8.tflite if the version has
  it, and the signature `pixels` of the SavedModel at the batch size that suits it best (its batching
  included, as it is a part of the graph);
- decode: Pillow (libjpeg-turbo) at full size, Pillow scaled in the DCT domain to no less than the network's
  side, neither of them resized any further, and the version's own decode.pb, which is ready for the network;
- copy: the bytes of a request, once, by NumPy;
- echo: a gRPC server in Python that returns the request's bytes.

Then the embedded server with one image to a request. Its limit is decode.pb and then network.tflite, on the
same CPUs: the rate at which both together could be done if nothing else had to be. share_of_limit is the
server's rate to that, in the same round, and server_cpu_to_parts is the CPU time of an image in the server to
that of both parts by themselves, which says more where others use the CPUs.

What is not fair: the callers of the server and of the echo run on the same machine, which the parts by
themselves need not share; with one CPU for the server they have the others, if there are any, and with all
they take some of the server's time, so that share_of_limit is understated there. The bare parts start from
images in memory, and always from the same ones, so caches are as warm as they can be.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from load import predict_with
from photos import photo_sheet
from PIL import Image
from result import ratios, spread, write_result

BATCHES = (1, 4, 8, 16, 32)
CALLERS_PER_CPU, CALLERS_AT_LEAST = 4, 8
OWN_DECODE, OWN_NETWORK = "decode, decode.pb", "network, litert"
TENSORFLOW = "network, tensorflow, batch of "
LARGE = "12 megapixels"
COPIES = 64  # of a request, so that more is read than the nearest cache holds

Cost = tuple[float, float]
"""Calls a second, and CPU seconds of one."""


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each part in each round")
    parser.add_argument("--version", type=Path, help="an exported version (default: one is made)")
    parser.add_argument("--parts-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--photos", type=Path, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.parts_of:
        _measure_parts(arguments.parts_of, arguments.photos, arguments.seconds)
        return
    if arguments.output is None:
        parser.error("expected --output, a folder for the result")
    arguments.output.mkdir(parents=True, exist_ok=True)
    from servers import export_digits, write_photos  # after `_measure_parts`, which needs none of it

    with tempfile.TemporaryDirectory() as folder:
        version = arguments.version or export_digits(Path(folder), quantize=True, max_accuracy_drop=1.0)
        photos = {"500 px": write_photos(Path(folder))[0], LARGE: Path(folder) / "large.jpg"}
        photo_sheet().save(photos[LARGE], quality=90)
        usable = sorted(os.sched_getaffinity(0))
        rows = []
        for cpus in [usable[:1], usable] if len(usable) > 1 else [usable]:
            rows += _compare(version, photos, cpus, arguments.rounds, arguments.seconds)
            print(json.dumps(rows[-len(photos) :], indent=2), flush=True)
    write_result(arguments.output, "limits", {"rows": rows}, rounds=arguments.rounds)


def _compare(
    version: Path, photos: Mapping[str, Path], cpus: Sequence[int], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each photograph."""
    from servers import serve_ours, serve_peer

    callers = max(CALLERS_AT_LEAST, CALLERS_PER_CPU * len(cpus))
    flags = ("--callers", callers, "--seconds", 2 * seconds, "--images")
    costs: dict[str, dict[str, list[Cost]]] = {name: {} for name in photos}
    with ExitStack() as stack:
        with _only_on(cpus):  # which they inherit
            parts = stack.enter_context(_parts_process(version, list(photos.values()), seconds))
            server = stack.enter_context(serve_ours(version.parent, "litert"))
            echo = stack.enter_context(serve_peer("echo", version, "litert"))
        for _ in range(rounds):
            bare = parts()
            for number, (name, photo) in enumerate(photos.items()):
                for part, cost in {**bare["any"], **bare["photos"][number]}.items():
                    costs[name].setdefault(part, []).append(cost)
                for part, served in (("echo", echo), ("server", server)):
                    got = served.load(*flags, photo)
                    costs[name].setdefault(part, []).append((got["per_s"], got["cpu_s"]))
    return [{"cpus": len(cpus), "photo": name, **_row(costs[name])} for name in photos]


def _row(costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    """Costs by part, round by round, as a row of the result."""
    rates = {part: [per_s for per_s, _ in values] for part, values in costs.items()}
    cpu_s = {part: [cpu_s for _, cpu_s in values] for part, values in costs.items()}
    pairs = zip(rates[OWN_DECODE], rates[OWN_NETWORK], strict=True)
    limit = [1 / (1 / decode + 1 / network) for decode, network in pairs]
    parts_cpu_s = list(map(sum, zip(cpu_s[OWN_DECODE], cpu_s[OWN_NETWORK], strict=True)))
    medians = {part: statistics.median(values) for part, values in rates.items()}
    batches = {part: rate for part, rate in medians.items() if part.startswith(TENSORFLOW)}
    best = max(batches, key=lambda part: batches[part])
    return {
        "share_of_limit": ratios(rates["server"], limit),
        "server_cpu_to_parts": ratios(cpu_s["server"], parts_cpu_s),
        "limit_images_per_s": spread(limit, 1),
        "best_batch_of_tensorflow": int(best.removeprefix(TENSORFLOW)),
        "images_per_s": {part: round(rate, 1) for part, rate in medians.items()},
        "cpu_ms_per_image": {
            part: round(1e3 * statistics.median(values), 3) for part, values in cpu_s.items()
        },
    }


@contextmanager
def _only_on(cpus: Sequence[int]) -> Iterator[None]:
    """What this thread starts meanwhile runs on these CPUs alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _parts_process(
    version: Path, photos: Sequence[Path], seconds: float
) -> Iterator[Callable[[], dict[str, Any]]]:
    """A process that measures the parts once for each call, and does nothing in between."""
    command = [sys.executable, __file__, "--parts-of", version, "--seconds", seconds, "--photos", *photos]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def measure() -> dict[str, Any]:
        print(file=process.stdin, flush=True)
        for line in process.stdout or ():
            measured: dict[str, Any] = json.loads(line)
            return measured
        raise SystemExit("the process that measures the parts ended; its error is above")

    with process:  # which closes its standard input, and waits for its end
        yield measure


def _measure_parts(version: Path, photos: Sequence[Path], seconds: float) -> None:
    """A line of JSON for each line on the standard input: costs of the parts, on this process' CPUs."""
    from bare import cpu_count, decode_graph, litert, measure

    from graftserve.client.wire.contract import PIXELS
    from graftserve.export.verify import open_signatures

    # A Session's own number of threads counts then. Source: tensorflow/core/common_runtime/local_device.cc.
    os.environ["TF_OVERRIDE_GLOBAL_THREADPOOL"] = "1"
    decode = decode_graph(version)
    contents = [photo.read_bytes() for photo in photos]
    side_px = decode(contents[0]).shape[0]
    batch = np.stack([decode(contents[number % len(contents)]) for number in range(max(BATCHES))])
    extra = version / "assets.extra"
    networks = {OWN_NETWORK: litert(extra / "network.tflite")}
    if (extra / "network.int8.tflite").is_file():
        networks["network, litert int8"] = litert(extra / "network.int8.tflite")

    def cost(call: Callable[[int], object], images: int = 1) -> Cost:
        measured = measure(call, cpu_count(), seconds)
        return measured.per_s * images, measured.cpu_s / images

    def of_photo(content: bytes) -> dict[str, Cost]:
        ways = {
            "decode, Pillow in full": lambda _: Image.open(io.BytesIO(content)).convert("RGB"),
            "decode, Pillow scaled": lambda _: _scaled(content, side_px),
            OWN_DECODE: lambda _: decode(content),
            "copy": _copying(predict_with("bench")(content)),
        }
        return {name: cost(call) for name, call in ways.items()}

    with open_signatures(version) as signatures:

        def run(size: int) -> Callable[[int], object]:
            return lambda _: signatures.run(PIXELS, batch[:size], ["probabilities"])

        for _ in sys.stdin:
            costs = {name: cost(lambda _, net=net: net(batch[:1])) for name, net in networks.items()}
            for size in BATCHES:
                costs[f"{TENSORFLOW}{size}"] = cost(run(size), size)
            print(json.dumps({"any": costs, "photos": [of_photo(content) for content in contents]}))
            sys.stdout.flush()


def _scaled(content: bytes, side_px: int) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (side_px, side_px))
    return image.convert("RGB")


def _copying(request: bytes) -> Callable[[int], None]:
    sources = [np.frombuffer(bytearray(request), np.uint8) for _ in range(COPIES)]
    local = threading.local()

    def copy(row: int) -> None:
        if not hasattr(local, "target"):
            local.target = np.empty_like(sources[0])
        np.copyto(local.target, sources[row % COPIES])

    return copy


if __name__ == "__main__":
    main()
