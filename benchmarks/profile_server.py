"""Where the embedded server's CPU time goes: by thread, and by what is done with an image.

    python benchmarks/profile_server.py --output benchmarks/results

One exported EfficientNet-Lite0 on LiteRT, photographs of 500 pixels and one of 12 megapixels, one image to a
request, from a few callers and from many. The server runs in this process, the callers in another. Before
and after each load /proc/self/task says what each thread has used, and so do counters around the decoding and
around the network's run, in the threads that do them:

- cpu_ms_per_image: decode, network, and the rest: reading and writing gRPC's messages, queues, locks, making
  the answer;
- threads: by their names without numbers: "litert-N" are the workers, which decode and run the network;
  "graftserve-grpc-N" answer calls, which "Thread-1 (_serve)" takes from gRPC; the others of graftserve
  poll, report health and so on; "event_engine" and the like are gRPC's own. Groups without a share are left
  out.

What is not fair: the counters read the thread's clock four times for each image, which is a microsecond or
two; /proc counts in hundredths of a second, so shares below one percent say little. The callers take CPU from
the server, which changes the rates, but hardly the CPU time of an image.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from photos import photo_sheet
from result import write_result
from servers import MODEL, Served, export_digits, write_photos
from threads import by_group, thread_times

from graftserve.client.wire.methods import PREDICT
from graftserve.serving import litert
from graftserve.serving.app import Server
from graftserve.serving.flags import Options

CALLERS = (1, 8, 32)
WARM_UP_S = 1.0
LEAST_SHARE = 0.001


class Clock:
    """CPU seconds that threads spent in a function, and how often it was called."""

    def __init__(self) -> None:
        self._calls: list[float] = []  # threads may append at the same time

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began_s = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self._calls.append(time.thread_time() - began_s)

        return timed

    def take(self) -> tuple[float, int]:
        """Seconds and calls since the last time."""
        calls, self._calls = self._calls, []
        return sum(calls), len(calls)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    parser.add_argument("--callers", type=int, nargs="+", default=CALLERS)
    parser.add_argument("--version", type=Path, help="an exported version (default: one is made)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    clocks = {"decode": Clock(), "network": Clock()}
    litert._Decoder.decode = clocks["decode"].around(litert._Decoder.decode)
    litert._Network.run = clocks["network"].around(litert._Network.run)
    with tempfile.TemporaryDirectory() as folder:
        version = arguments.version or _in_a_process_of_its_own(export_digits, Path(folder))
        large = Path(folder) / "large.jpg"
        photo_sheet().save(large, quality=90)
        photos = {"500 px": write_photos(Path(folder)), "12 megapixels": [large]}
        options = Options(
            model_name=MODEL, model_base_path=str(version.parent), host="127.0.0.1", port=0, engine="litert"
        )
        server = Server(options, owns_process=True)
        began_s = time.monotonic()
        server.start()
        started_s = time.monotonic() - began_s
        served = Served("predict", f"127.0.0.1:{server.grpc_port}", PREDICT.path, os.getpid(), "", started_s)
        try:
            rows = []
            for name, images in photos.items():
                served.load("--callers", max(arguments.callers), "--seconds", WARM_UP_S, "--images", *images)
                for callers in arguments.callers:
                    flags = ("--callers", callers, "--seconds", arguments.seconds, "--images", *images)
                    rows.append({"photo": name, "callers": callers, **_profile(served, flags, clocks)})
                    print(json.dumps(rows[-1], indent=2), flush=True)
        finally:
            server.stop()
    write_result(arguments.output, "profile_server", {"rows": rows}, rounds=1)


def _in_a_process_of_its_own(make: Callable[[Path], Path], folder: Path) -> Path:
    """Training and export would leave TensorFlow with threads that a server has not."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(make, folder).result()


def _profile(served: Served, flags: tuple[object, ...], clocks: dict[str, Clock]) -> dict[str, Any]:
    for clock in clocks.values():
        clock.take()
    before, began_s = thread_times(), time.process_time()
    load = served.load(*flags)
    total_s, groups = time.process_time() - began_s, by_group(before, thread_times())
    images = load["requests"]
    taken = {name: clock.take() for name, clock in clocks.items()}
    for name, (_, calls) in taken.items():
        if calls != images:
            raise SystemExit(f"{name}: expected a call for each of {images} images, got {calls}")
    parts_s = {name: seconds for name, (seconds, _) in taken.items()}
    parts_s["rest"] = total_s - sum(parts_s.values())
    return {
        "images_per_s": round(load["per_s"], 1),
        "share_of_cpu": {name: round(seconds / total_s, 3) for name, seconds in parts_s.items()},
        "cpu_ms_per_image": {
            name: round(1e3 * seconds / images, 3) for name, seconds in {**parts_s, "all": total_s}.items()
        },
        "threads": {
            name: {
                "threads": times.threads,
                "share_of_cpu": round(times.total_s / total_s, 3),
                "user_ms_per_image": round(1e3 * times.user_s / images, 3),
                "system_ms_per_image": round(1e3 * times.system_s / images, 3),
            }
            for name, times in groups.items()
            if times.total_s >= LEAST_SHARE * total_s
        },
    }


if __name__ == "__main__":
    main()
