"""`graftserve demo`: the whole path on handwritten digits, every part of it real.

Images become files, a run, a version; the server is a process of its own; while clients keep asking, a second
version is published and takes over.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from graftserve.client import Client, ClientError, Prediction, RetryPolicy

from .output import CommandError, ProgressPrinter, import_tensorflow, print_result, require_extra, say
from .server_process import ServerProcess

__all__ = ["command"]

_MODEL = "digits"
_CALLERS = 8
_SHOWN = 5
_SWITCH_TIMEOUT_S = 120.0
_CALLS_AFTER_SWITCH = 100


@click.command("demo")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=Path("graftserve-demo"),
    show_default=True,
    help="Where images, features, run and models are kept.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(work_dir: Path, as_json: bool) -> None:
    """Train on scikit-learn's 1,797 handwritten digits, export, serve and classify; then publish a second
    version while clients keep asking, and report.

    Needs no network. A second run takes the features from its cache.
    """
    for module in ("sklearn", "cheroot"):
        require_extra(module, "demo")
    import_tensorflow("demo")
    from graftserve.export import export_run
    from graftserve.training import Recipe, train

    from .digits import held_out_images, write_digits

    started = time.monotonic()
    data_dir, run_dir, model_base_path = work_dir / _MODEL, work_dir / "run", work_dir / "models" / _MODEL
    images = write_digits(data_dir)
    say(f"1/5 images: {images} JPEG files in {data_dir}")

    run = train(
        Recipe(str(data_dir)),
        run_dir,
        cache_dir=work_dir / "cache",
        overwrite=True,
        listener=ProgressPrinter(),
    )
    accuracy = run.metrics["evaluation"]["test"]["accuracy"]
    say(f"2/5 training: test accuracy {accuracy:.4f} in {run.metrics['seconds']['total']:.1f} s")

    first = export_run(run_dir, model_base_path)
    say(f"3/5 export: {first.path} in {first.seconds:.1f} s")

    held_out = held_out_images(run_dir, data_dir)
    with ServerProcess(_MODEL, model_base_path) as server:
        target = server.addresses()["gRPC"]
        with Client(target, _MODEL) as client:
            say(f"4/5 serving: version {client.wait_until_ready()} at {target}")
            served = _measure(client, held_out)

            say(f"5/5 rollout: publishing the next version while {_CALLERS} callers ask")
            with _Load(target, held_out) as load:
                second = export_run(run_dir, model_base_path)
                switch_s = load.wait_for_version(second.version)
            examples = [
                (path, label, client.classify(path)) for path, label in held_out[:: len(held_out) // _SHOWN]
            ]

    features = run.metrics["features"]
    result: dict[str, Any] = {
        "test_accuracy": round(accuracy, 4),
        "served_accuracy": round(served.accuracy, 4),
        "features_computed": features["computed"],
        "features_images_per_s": round(images / run.metrics["seconds"]["features"], 1),
        "head_s": run.metrics["seconds"]["fitting"],
        "export_s": round(first.seconds, 1),
        "served_images_per_s": round(served.images_per_s, 1),
        "rollout_requests": load.answered + load.failed,
        "rollout_failed": load.failed,
        "rollout_answers_by_version": {str(version): n for version, n in sorted(load.by_version.items())},
        "switch_s": round(switch_s, 1),
        "total_s": round(time.monotonic() - started, 1),
    }
    if as_json:
        print_result(result, as_json=True)
    else:
        _print_report(result, examples[:_SHOWN], data_dir, model_base_path)
    if load.failed:
        raise CommandError(f"{load.failed} requests failed during the rollout; the first: {load.first_error}")


def _print_report(
    result: dict[str, Any],
    examples: list[tuple[Path, str, Prediction]],
    data_dir: Path,
    model_base_path: Path,
) -> None:
    by_version = ", ".join(f"{n} by version {v}" for v, n in result["rollout_answers_by_version"].items())
    accuracy = f"{result['test_accuracy']:.4f} on held-out images, {result['served_accuracy']:.4f} as served"
    requests = f"{result['rollout_requests']} requests, {result['rollout_failed']} failed"
    how = "computed" if result["features_computed"] else "from the cache"
    click.echo()
    print_result(
        {
            "accuracy": accuracy,
            "features": f"{result['features_images_per_s']:.0f} images/s ({how})",
            "head": f"{result['head_s']:.1f} s",
            "export": f"{result['export_s']:.1f} s, checked against the trained model",
            "serving": f"{result['served_images_per_s']:.0f} images/s over gRPC",
            "rollout": f"{requests}; {by_version}",
            "switch": f"{result['switch_s']:.1f} s from publishing to the first answer of the new version",
            "total": f"{result['total_s']:.0f} s",
        },
        as_json=False,
    )
    click.echo()
    for path, label, prediction in examples:
        mark = "" if prediction.label == label else f"  (it is a {label})"
        click.echo(f"{path.relative_to(data_dir)}  {prediction.label}  {prediction.score:.4f}{mark}")
    click.echo()
    click.echo(f"The model is in {model_base_path}; serve it with")
    click.echo(f"  graftserve serve --model_name {_MODEL} --model_base_path {model_base_path}")


@dataclass(frozen=True)
class _Served:
    accuracy: float
    images_per_s: float


def _measure(client: Client, held_out: list[tuple[Path, str]]) -> _Served:
    started = time.monotonic()
    results = client.classify_many(path for path, _ in held_out)
    elapsed_s = time.monotonic() - started
    right = sum(
        isinstance(result, Prediction) and result.label == label
        for result, (_, label) in zip(results, held_out, strict=True)
    )
    return _Served(right / len(held_out), len(held_out) / elapsed_s)


@dataclass
class _Load:
    """Callers that keep asking, each over its own connection, and count what they get."""

    target: str
    held_out: list[tuple[Path, str]]
    by_version: Counter[int] = field(default_factory=Counter)
    failed: int = 0
    first_error: ClientError | None = None

    def __post_init__(self) -> None:
        self._stop = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(_CALLERS)]

    @property
    def answered(self) -> int:
        return self.by_version.total()

    def __enter__(self) -> "_Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()

    def wait_for_version(self, version: int) -> float:
        """Wait until `version` answers, and then some; returns the seconds until its first answer."""
        started = time.monotonic()
        if not self._wait(lambda: self.by_version[version] > 0):
            raise CommandError(f"version {version} did not answer within {_SWITCH_TIMEOUT_S:.0f} s")
        switch_s = time.monotonic() - started
        self._wait(lambda: self.by_version[version] >= _CALLS_AFTER_SWITCH)
        return switch_s

    def _wait(self, condition: Callable[[], bool]) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, _SWITCH_TIMEOUT_S)

    def _ask(self, start: int) -> None:
        # One attempt each: a retry would hide a request that the server lost.
        with Client(self.target, _MODEL, retry=RetryPolicy(max_attempts=1)) as client:
            index = start
            while not self._stop:
                path, _ = self.held_out[index % len(self.held_out)]
                index += _CALLERS
                try:
                    version = client.classify(path).version
                except ClientError as error:
                    with self._changed:
                        self.failed += 1
                        self.first_error = self.first_error or error
                    return
                with self._changed:
                    self.by_version[version] += 1
                    self._changed.notify_all()
