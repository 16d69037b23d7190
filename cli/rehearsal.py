"""`graftserve rehearsal`: a canary rollout on this machine, with the parts that a cluster would have.

Three servers, each a process with one pinned version, are the pods: two stable, one canary. Envoy is the
Gateway, callers ask through it all the time, and the gate is that of `graftserve rollout`.
"""

import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import (
    CommandError,
    ProgressPrinter,
    import_tensorflow,
    print_result,
    require_extra,
    say,
    write_whole,
)
from .server_process import ServerProcess
from .termination import terminated_in_order

if TYPE_CHECKING:
    from graftserve.k8s.rehearsal import Answer, Rollouts, Step

__all__ = ["command"]

_MODEL = "digits"
_STABLE, _GOOD, _BAD = 1, 2, 3
_SWAPPED = ("4", "9")  # whoever labelled the bad version's images took one for the other
_READY_TIMEOUT_S = 120.0


@click.command("rehearsal")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default=Path("graftserve-rehearsal"),
    show_default=True,
    help="Where images, models, Envoy's files and the drawing are kept.",
)
@click.option(
    "--step-s",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds of traffic at each weight, before the versions are compared.",
)
@click.option(
    "--callers",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="How many ask at a time, each again when it is answered.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=10),
    default=60,
    show_default=True,
    help="How many of the held-out images the two versions are compared on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(work_dir: Path, step_s: float, callers: int, sample: int, as_json: bool) -> None:
    """Rehearse a canary rollout without a cluster: three servers behind a real Envoy, and callers that ask
    all the time.

    A good version gets 1, 10, 50 and 100% of the requests, compared with stable at each weight, and is taken
    back. Then a bad one comes, trained with two digits swapped: its calls succeed and are as quick, and only
    the comparison can find it. Each request is tried once, so that one that is lost shows.

    Prints the timeline and draws it to timeline.svg in the work directory. The exit status is 0 only if the
    good version went all the way, the bad one was aborted by agreement alone, every weight was kept, and no
    request failed. A second run takes the models that are there.
    """
    for module in ("sklearn", "cheroot", "matplotlib"):
        require_extra(module, "rehearsal")
    from graftserve.k8s.rehearsal import WEIGHTS_PERCENT, Rollouts, find_envoy, problems

    from .rehearsal_plot import write_timeline

    find_envoy()  # before the minute of training
    started = time.monotonic()
    plan = Rollouts(_STABLE, _GOOD, _BAD, WEIGHTS_PERCENT)
    work_dir.mkdir(parents=True, exist_ok=True)
    with terminated_in_order(), _alone(work_dir):
        held_out = _prepare(work_dir)
        if not as_json:
            click.echo(_HEADER)
        steps, answers = _rehearse(work_dir, held_out, step_s, callers, sample, quiet=as_json)
    plot = work_dir / "timeline.svg"
    write_timeline(steps, answers, plot)
    found = problems(steps, answers, plan)
    _report(steps, answers, plan, found, plot, time.monotonic() - started, as_json=as_json)
    if found:
        raise CommandError(f"not as it must go: {'; '.join(found)}")


def _prepare(work_dir: Path) -> list[tuple[Path, str]]:
    """The model's three versions, unless they are there; gives the images that the first run held out."""
    from .digits import held_out_images, write_digits

    data_dir, run_dir, models = work_dir / _MODEL, work_dir / "run", work_dir / "models" / _MODEL
    count = write_digits(data_dir)
    say(f"{count} images of digits in {data_dir}")
    if not (models / str(_BAD)).is_dir():
        import_tensorflow("rehearsal")
        from graftserve.export import export_run
        from graftserve.training import Recipe, train

        swapped_dir = work_dir / "swapped"
        _swap(data_dir, swapped_dir)
        runs = {_STABLE: (run_dir, data_dir), _GOOD: (run_dir, data_dir)}
        runs[_BAD] = (work_dir / "swapped-run", swapped_dir)
        trained: set[Path] = set()
        for version, (run, images) in runs.items():
            if (models / str(version)).is_dir():
                continue
            if run not in trained:
                train(
                    Recipe(str(images)),
                    run,
                    cache_dir=work_dir / "cache",
                    overwrite=True,
                    listener=ProgressPrinter(),
                )
                trained.add(run)
            say(f"version {version}: {export_run(run, models, version=version).path}")
    return held_out_images(run_dir, data_dir)


def _swap(data_dir: Path, swapped_dir: Path) -> None:
    """The same files, those of two classes in each other's folders."""
    first, second = _SWAPPED
    other = {first: second, second: first}
    for path in sorted(data_dir.glob("*/*.jpg")):
        label = path.parent.name
        link = swapped_dir / other.get(label, label) / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.link(path, link)


def _rehearse(
    work_dir: Path, held_out: list[tuple[Path, str]], step_s: float, callers: int, sample: int, *, quiet: bool
) -> "tuple[Sequence[Step], Sequence[Answer]]":
    from graftserve.client import Client
    from graftserve.k8s.rehearsal import Envoy, Ramp, Traffic
    from graftserve.k8s.rollout import Report, compare

    images = [(path.read_bytes(), label) for path, label in held_out]
    chosen = [path for path, _ in random.Random(0).sample(held_out, min(sample, len(held_out)))]

    with ExitStack() as stack:
        say("starting three servers and Envoy")
        pods = [stack.enter_context(_Pod(work_dir, name, _STABLE)) for name in ("stable-0", "stable-1")]
        canary = stack.enter_context(_Pod(work_dir, "canary", _GOOD))
        stable_targets = [pod.wait_until_ready() for pod in pods]
        canary_target = canary.wait_until_ready()
        envoy = stack.enter_context(Envoy(stable_targets, [canary_target], work_dir / "envoy"))
        traffic = stack.enter_context(Traffic(envoy.target, _MODEL, images, callers=callers))

        def compared(version: int) -> Report:
            with (
                Client(stable_targets[0], _MODEL, version=_STABLE) as old,
                Client(canary_target, _MODEL, version=version) as new,
            ):
                return compare(old, new, chosen, seed=0, max_errors=0)

        ramp = Ramp(
            envoy,
            traffic,
            step_s=step_s,
            listener=lambda step: None if quiet else click.echo(_row(step)),
        )
        ramp.hold("stable", None, 0)
        if ramp.rise(_GOOD, lambda: compared(_GOOD)):
            ramp.hold("taken back", _GOOD, 0)
        # As when a pod is replaced: it has no traffic, ends, and another comes to its place.
        canary.replace(_BAD)
        if ramp.rise(_BAD, lambda: compared(_BAD)):
            ramp.hold("taken back", _BAD, 0)
        ramp.hold("stable", None, 0)
    return ramp.steps, traffic.answers()


class _Pod:
    """A server process with one pinned version, as the manifests' models.config has it; a context manager.

    What replaces it listens on the same port.
    """

    def __init__(self, work_dir: Path, name: str, version: int) -> None:
        self._base_path = (work_dir / "models" / _MODEL).absolute()
        self._config = work_dir / f"{name}.config"
        self._target = ""
        self._server = self._start(version)

    def __enter__(self) -> "_Pod":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._server.__exit__(kind, error, trace)

    def wait_until_ready(self) -> str:
        """Its address, once its version is AVAILABLE. Raises CommandError, ClientError."""
        from graftserve.client import Client

        self._target = self._server.addresses()["gRPC"]
        with Client(self._target, _MODEL) as client:
            client.wait_until_ready(timeout_s=_READY_TIMEOUT_S)
        return self._target

    def replace(self, version: int) -> None:
        """End it and start another; returns when that is ready. Raises CommandError, ClientError."""
        self._server.__exit__(None, None, None)
        self._server = self._start(version, f"--port={self._target.rpartition(':')[2]}")
        self.wait_until_ready()

    def _start(self, version: int, *flags: str) -> ServerProcess:
        path = json.dumps(str(self._base_path), ensure_ascii=False)
        policy = f"model_version_policy {{ specific {{ versions: {version} }} }}"
        with write_whole(self._config) as file:
            file.write(f'model_config_list {{ config {{ name: "{_MODEL}" base_path: {path} {policy} }} }}\n')
        return ServerProcess(_MODEL, self._base_path, f"--model_config_file={self._config}", *flags)


_HEADER = "    time  weight  requests by version          failed     p50     p99  verdict"


def _row(step: "Step") -> str:
    versions = "  ".join(f"v{version} {count}" for version, count in step.by_version.items())
    p50_ms, p99_ms = (step.latency_s(percent) * 1e3 for percent in (50, 99))
    said = step.verdict or step.name
    if step.report is not None and not step.failures:
        said = f"passed: agreement {step.report.agreement:.4f} on {step.report.compared} images"
    return (
        f"{step.began_s:6.1f} s  {step.weight_percent:5}%  {versions:<27}  {step.failed:6}  "
        f"{p50_ms:3.0f} ms  {p99_ms:3.0f} ms  {said}"
    )


def _report(
    steps: "Sequence[Step]",
    answers: "Sequence[Answer]",
    plan: "Rollouts",
    found: Sequence[str],
    plot: Path,
    total_s: float,
    *,
    as_json: bool,
) -> None:
    errors = [answer.error for answer in answers if answer.error]
    accuracy = _accuracy(answers)
    if as_json:
        result = {
            "ok": not found,
            "problems": list(found),
            "requests": len(answers),
            "failed": len(errors),
            "first_error": errors[0] if errors else None,
            "versions": {"stable": plan.stable, "good": plan.good, "bad": plan.bad},
            "accuracy_by_version": {str(version): round(share, 4) for version, share in accuracy.items()},
            "steps": [_step_to_json(step) for step in steps],
            "plot": str(plot),
            "total_s": round(total_s, 1),
        }
        print_result(result, as_json=True)
        return
    click.echo()
    print_result(
        {
            "requests": f"{len(answers)}, {len(errors)} failed",
            "accuracy": ", ".join(f"{share:.4f} of version {version}" for version, share in accuracy.items())
            + ", which only the rehearsal knows",
            "timeline": plot,
            "total": f"{total_s:.0f} s",
        },
        as_json=False,
    )


def _accuracy(answers: "Sequence[Answer]") -> dict[int, float]:
    """The share of right labels that callers got, by version."""
    total = Counter(answer.version for answer in answers if answer.version is not None)
    right = Counter(answer.version for answer in answers if answer.right)
    return {version: right[version] / count for version, count in sorted(total.items())}


def _step_to_json(step: "Step") -> dict[str, Any]:
    report = step.report
    return {
        "name": step.name,
        "canary": step.canary,
        "weight_percent": step.weight_percent,
        "began_s": round(step.began_s, 3),
        "ended_s": round(step.ended_s, 3),
        "requests_by_version": {str(version): count for version, count in step.by_version.items()},
        "failed": step.failed,
        "p50_ms": _number(step.latency_s(50) * 1e3),
        "p99_ms": _number(step.latency_s(99) * 1e3),
        "verdict": step.verdict or None,
        "comparison": None
        if report is None
        else {
            "images": report.images,
            "agreement": _number(report.agreement),
            "largest_shift": _number(report.largest_shift),
            "latency_ratio": _number(report.latency_ratio),
            "errors": report.errors,
        },
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


@contextmanager
def _alone(work_dir: Path) -> Iterator[None]:
    """Raises CommandError if another rehearsal has the folder."""
    from graftserve.k8s.rollout.files import LockedError, locked

    try:
        with locked(work_dir / "lock", wait=False, holder=f"process {os.getpid()}"):
            yield
    except LockedError as error:
        raise CommandError(f"{work_dir}: {error.holder} rehearses there: give another --work-dir") from error
