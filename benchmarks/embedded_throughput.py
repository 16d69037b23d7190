"""The embedded server against the bare signature call, side by side in one run.

    python benchmarks/embedded_throughput.py --output benchmarks/results

Three ways to the same answers, taken in turn over several rounds, so that a machine whose speed drifts
treats them alike: the exported signature called in process from as many threads as there are callers, the
server over gRPC through the client, and the frozen network alone on decoded pixels at its best batch size.
What is compared are the ratios within a round; the seconds are this machine's.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from result import spread, write_result

from graftserve.cli.digits import write_digits
from graftserve.cli.server_process import ServerProcess
from graftserve.client import Client
from graftserve.client.wire.contract import SERVING_DEFAULT
from graftserve.export import export_run
from graftserve.export.verify import open_signatures
from graftserve.training import Recipe, train
from graftserve.training.network import freeze
from graftserve.training.preprocess import decode_images

MODEL = "digits"
BATCH = 8


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=96, help="images of each way in each round")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        write_digits(work_dir / "digits")
        for image in (work_dir / "digits").rglob("*.jpg"):
            if int(image.stem) >= 200:  # the head that few images train is as large as any
                image.unlink()
        run = train(Recipe(str(work_dir / "digits")), work_dir / "run", cache_dir=work_dir / "cache")
        model_base_path = work_dir / "models" / MODEL
        exported = export_run(run.path, model_base_path)
        images = [golden.file.read_bytes() for golden in run.goldens]
        bare_network = _bare_network(run.load_model(), images, run.preprocess)
        with (
            open_signatures(exported.path) as signatures,
            ServerProcess(MODEL, model_base_path, "--grpc_max_threads=64") as server,
        ):
            target = server.addresses()["gRPC"]
            rows = []
            for callers in arguments.callers:
                ways = {
                    "network": bare_network,
                    "signature": lambda rows: signatures.run(SERVING_DEFAULT, [images[row] for row in rows]),
                    "server": _over_grpc(target, images),
                }
                rows.append(_compare(ways, callers, arguments.images, arguments.rounds))
                print(_line(rows[-1]), flush=True)

    result = {
        "rows": rows,
    }
    write_result(arguments.output, "embedded_throughput", result)


def _compare(
    ways: dict[str, Callable[[list[int]], object]], callers: int, count: int, rounds: int
) -> dict[str, object]:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for name, call in ways.items():
        _rate(call, callers, callers * 2, BATCH if name == "network" else 1)
    for _ in range(rounds):
        for name, call in ways.items():
            if name == "network":
                rates[name].append(_rate(call, 1, count, BATCH))
            else:
                rates[name].append(_rate(call, callers, count, 1))
    ratios = [server / bare for server, bare in zip(rates["server"], rates["signature"], strict=True)]
    return {
        "callers": callers,
        "images_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "server_to_signature": spread(ratios),
    }


def _rate(call: Callable[[list[int]], object], callers: int, count: int, batch: int) -> float:
    """Images a second of `count` images, in calls of `batch`, from `callers` threads."""
    calls = [[(start + offset) % BATCH for offset in range(batch)] for start in range(0, count, batch)]
    with ThreadPoolExecutor(callers) as pool:
        started = time.perf_counter()
        list(pool.map(call, calls))
        return len(calls) * batch / (time.perf_counter() - started)


def _line(row: dict) -> str:
    rates = ", ".join(f"{name} {rate}" for name, rate in row["images_per_s"].items())
    ratio = row["server_to_signature"]
    return (
        f"{row['callers']:>3} callers: images/s {rates}; "
        f"server / signature {ratio['median']} ({ratio['min']} to {ratio['max']})"
    )


def _bare_network(model, images, preprocess) -> Callable[[list[int]], object]:
    network = freeze(model)
    pixels = decode_images(images, preprocess)
    return lambda rows: [output.numpy() for output in network(tf.gather(pixels, rows))]


def _over_grpc(target: str, images: list[bytes]) -> Callable[[list[int]], object]:
    """One client for each thread, as separate callers would have."""
    local = threading.local()

    def call(rows: list[int]) -> object:
        if not hasattr(local, "client"):
            local.client = Client(target, MODEL)
        return local.client.predict({"image_bytes": np.array([images[row] for row in rows], object)})

    return call


if __name__ == "__main__":
    main()
