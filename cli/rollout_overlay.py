"""`graftserve rollout --overlay`: versions in a Kustomize overlay's files, a diff to review and commit."""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .connection import Connection
from .output import CommandError, say
from .rollout_check import check_source, check_source_goldens
from .rollout_output import (
    compare_shown,
    differences,
    end,
    next_command,
    numbers,
    print_values,
    sample_images,
    show_history,
    state_folder,
    who,
)
from .termination import terminated_in_order

if TYPE_CHECKING:
    from graftserve.client import Client
    from graftserve.k8s.rollout import (
        Cluster,
        Journal,
        JournalWriter,
        Overlay,
        OverlayDriver,
        Ramp,
        Report,
        Rollout,
        Share,
        Tracks,
    )

__all__ = ["abort", "apply", "history", "promote", "start", "status", "undo"]


def start(
    folder: Path,
    *,
    version: int,
    images: tuple[str, ...],
    skip_comparison: bool,
    sample: int,
    seed: int,
    min_agreement: float,
    max_shift: float,
    max_latency_ratio: float,
    max_errors: int,
    replicas: int | None,
    weight: int | None,
    ramp: tuple[int, ...] | None,
    hold_s: float,
    target_stable: str | None,
    target_canary: str | None,
    auto: bool,
    connection: Connection,
    **common: Any,
) -> None:
    """Put a version on the canary track, or go on with it: move its weight, compare it."""
    from graftserve.k8s.rollout import AlreadyStableError, Gate, Ramp, Share, begin

    if skip_comparison and images:
        raise click.UsageError("--images and --skip-comparison exclude each other")
    if bool(target_stable) != bool(target_canary) or (target_stable and not images):
        raise click.UsageError(
            "--images, --target-stable and --target-canary belong together: the images are asked of both"
        )
    if images and not target_stable and not common["apply_it"]:
        raise click.UsageError(
            "--images needs --target-stable and --target-canary, or --apply, which finds its own way to the "
            "pods"
        )
    if not images and connection != Connection():
        raise click.UsageError("--tls and --header are for the comparison: give --images, too")
    if ramp and (weight is not None or not common["apply_it"]):
        raise click.UsageError("--ramp needs --apply, and goes without --weight, which it moves by itself")
    try:
        steps = None if ramp is None else Ramp(ramp, hold_s)
    except ValueError as error:
        raise click.UsageError(f"--ramp: {error}") from error
    if auto and not images and not skip_comparison:
        raise click.UsageError("--auto needs --images to compare the versions on, or --skip-comparison")
    chosen = sample_images(images, sample, seed)

    with _opened(folder, common) as run:

        def shadow(canary: int, stable: int) -> "Report":
            from graftserve.client import Client

            model, timeout_s = run.overlay.model(), common["timeout_s"]
            arguments = connection.client_arguments()

            def connected(track: str, version: int, target: str | None) -> Client:
                where = f"--target-{track} {target}"
                if target is None and run.cluster is not None:
                    where = f"a port-forward to the {track} track"
                    target = stack.enter_context(run.cluster.way_to(track))
                client = Client(str(target), model, version=version, timeout_s=timeout_s, **arguments)
                stack.enter_context(client)
                _see_that_it_serves(client, version, where)
                return client

            with ExitStack() as stack:
                old = connected("stable", stable, target_stable)
                new = connected("canary", canary, target_canary)
                source = run.overlay.source()
                check_source_goldens(source, new, version=canary, model=model, timeout_s=timeout_s)
                return compare_shown(old, new, chosen, seed=seed, max_errors=max_errors)

        gate = Gate(min_agreement, max_shift, max_latency_ratio, max_errors)
        current = run.writer.record.current
        if current is not None and current.version == version and current.kind == "rollout":
            say(f"going on with {current.title}")
            kept = None if skip_comparison else gate if images else current.gate
            run.writer.update(replace(current, gate=kept, auto=auto))
        else:
            try:
                begin(
                    run.overlay,
                    run.writer,
                    version=version,
                    gate=None if skip_comparison else gate,
                    auto=auto,
                    by=who(),
                    note=common["message"],
                )
            except AlreadyStableError as error:
                print_values({"outcome": "promoted", "version": version}, common["as_json"], f"{error}")
                return
        if (weight or ramp) and not run.overlay.has_route():
            say(f"{folder} lists no component gateway: without a route the weight moves nothing")
        elif weight and run.cluster is None and run.overlay.read().canary != version:
            say(
                f"the route gives version {version} {weight}% of the calls as soon as this is applied, ready "
                "or not: apply it with --weight 0 first, and this when its pods are ready; --apply does both"
            )
        rollout = run.driver(Share(replicas, weight), steps, shadow if images else None).run()
    _show(run, rollout, was_begun=_was_begun(rollout))
    end(rollout.outcome != "aborted")


def promote(folder: Path, **common: Any) -> None:
    """Put the canary's version on the stable track, and take the canary away."""
    from graftserve.k8s.rollout import Decision, decide_on_overlay

    with _opened(folder, common) as run:
        reason = common["message"] or f"promoted by {who()}"
        decide_on_overlay(run.overlay, run.writer, Decision.PROMOTE, reason)
        rollout = run.driver().run()
    _show(run, rollout)
    end(rollout.outcome == "promoted")


def abort(folder: Path, *, leave_it: bool, **common: Any) -> None:
    """Take the canary away, and put the version before on the stable track if it is not there any more."""
    from graftserve.k8s.rollout import Decision, decide_on_overlay, leave

    with _opened(folder, common) as run:
        reason = common["message"] or f"aborted by {who()}"
        if leave_it:
            rollout = leave(run.writer, reason)
        else:
            decide_on_overlay(run.overlay, run.writer, Decision.ABORT, reason)
            rollout = run.driver().run()
    _show(run, rollout)
    end(rollout.outcome != "promoted")


def undo(folder: Path, **common: Any) -> None:
    """Put the version before the last promoted one back on the stable track."""
    from graftserve.k8s.rollout import begin_undo

    with _opened(folder, common) as run:
        current = run.writer.record.current
        if current is None or current.kind != "undo":
            begin_undo(run.overlay, run.writer, by=who(), note=common["message"])
        else:
            say(f"going on with {current.title}")
        rollout = run.driver().run()
    _show(run, rollout, was_begun=_was_begun(rollout))
    end(rollout.outcome == "promoted")


def apply(folder: Path, *, take_over: tuple[str, ...], as_json: bool, **common: Any) -> None:
    """Bring what the files say to the cluster, whatever is under way."""
    from graftserve.k8s.rollout import Overlay

    overlay = Overlay(folder)
    overlay.check_components()
    with _cluster(folder, common) as cluster, _writing(overlay):
        if take_over:
            cluster.take_over(take_over)
        tracks = overlay.read()
        cluster.settle(tracks)
    values = {"overlay": str(folder), "stable": tracks.stable, "canary": tracks.canary}
    lines = [f"stable     version {tracks.stable}", f"canary     {_canary(tracks)}", f"applied {folder}"]
    print_values(values, as_json, "\n".join(lines))


def status(folder: Path, *, as_json: bool, timeout_s: float, ask_cluster: bool, context: str) -> None:
    """What the files say, and what is under way; the cluster, too, if it is to be asked."""
    from graftserve.k8s.rollout import Overlay, changed_by_others, rollout_to_json

    if context and not ask_cluster:
        raise click.UsageError("--context belongs to --cluster")
    overlay = Overlay(folder)
    record, tracks = _journal(overlay).read(), overlay.read()
    current = record.current
    changed = None if current is None else changed_by_others(current, tracks)
    live = _seen(folder, context, timeout_s) if ask_cluster else None
    values = {
        "overlay": str(folder),
        "model": overlay.model(),
        "stable": tracks.stable,
        "canary": tracks.canary,
        "replicas": tracks.replicas,
        "stable_weight": tracks.stable_weight,
        "weight": tracks.weight,
        "conflict": changed,
        "cluster": None if live is None else live.values,
        "current": None if current is None else rollout_to_json(current),
    }
    lines = [f"stable     version {tracks.stable}", f"canary     {_canary(tracks)}"]
    lines += [] if live is None else live.lines
    if current is None:
        lines.append("no rollout is under way")
    else:
        lines += [
            f"{current.title}, begun {current.started_at} by {current.by or 'unknown'}",
            *numbers(current),
            f"next: {next_command(current)}",
        ]
    if changed:
        lines.append(f"somebody else changed the files: {changed}")
    print_values(values, as_json, "\n".join(lines))
    end(not changed and (live is None or live.as_it_should_be))


def history(folder: Path, *, as_json: bool) -> None:
    """The rollouts of an overlay."""
    from graftserve.k8s.rollout import Overlay

    overlay = Overlay(folder)
    place = {"overlay": str(folder), "model": overlay.model()}
    show_history(place, _journal(overlay).read(), as_json)


@dataclass(frozen=True)
class _Seen:
    """What the cluster has, for machines and for people."""

    as_it_should_be: bool
    values: dict[str, Any]
    lines: list[str]


def _seen(folder: Path, context: str, timeout_s: float) -> _Seen:
    from graftserve.k8s.rollout import Cluster

    with Cluster(folder, context=context, timeout_s=timeout_s, patience_s=timeout_s, listener=say) as cluster:
        states, route, differ = cluster.states(), cluster.route_troubles(), cluster.differences()
    lines = ["in the cluster:"]
    for name, state in states.items():
        version = "no version" if state.version is None else f"version {state.version}"
        lines.append(f"  {name}  {version}, {state.text}")
        lines += [f"    {trouble}" for trouble in state.troubles]
    lines += [f"  route: {trouble}" for trouble in route]
    if differ:
        lines.append(f"  not as the files say: {', '.join(differ)}; `graftserve rollout apply` changes that")
    values = {
        "differ": differ,
        "deployments": {name: asdict(state) for name, state in states.items()},
        "route_troubles": route,
    }
    return _Seen(not differ and not route and all(state.ready for state in states.values()), values, lines)


@dataclass(frozen=True)
class _Run:
    """The overlay, its journal with the lock held, and what makes the driver of the two."""

    overlay: "Overlay"
    writer: "JournalWriter"
    cluster: "Cluster | None"
    as_json: bool
    timeout_s: float

    def driver(
        self,
        share: "Share | None" = None,
        ramp: "Ramp | None" = None,
        shadow: "Callable[[int, int], Report] | None" = None,
    ) -> "OverlayDriver":
        from graftserve.k8s.rollout import OverlayDriver

        return OverlayDriver(
            self.overlay,
            self.writer,
            check=self._check,
            share=share,
            ramp=ramp,
            cluster=self.cluster,
            shadow=shadow,
            listener=say,
        )

    def _check(self, version: int) -> str:
        return check_source(self.overlay.source(), version, self.timeout_s)


@contextmanager
def _opened(folder: Path, common: dict[str, Any]) -> Iterator[_Run]:
    from graftserve.k8s.rollout import Overlay

    if common["context"] and not common["apply_it"]:
        raise click.UsageError("--context belongs to --apply")
    overlay = Overlay(folder)
    overlay.check_components()
    with ExitStack() as stack:
        cluster = stack.enter_context(_cluster(folder, common)) if common["apply_it"] else None
        writer = stack.enter_context(_writing(overlay))
        stack.enter_context(terminated_in_order())  # port-forwards end with it
        try:
            yield _Run(overlay, writer, cluster, common["as_json"], common["timeout_s"])
        except (KeyboardInterrupt, SystemExit):
            say("interrupted: the same command goes on, `graftserve rollout abort` goes back")
            raise


def _cluster(folder: Path, common: dict[str, Any]) -> "Cluster":
    from graftserve.k8s.rollout import Cluster

    return Cluster(
        folder,
        context=common["context"],
        timeout_s=common["timeout_s"],
        patience_s=common["patience_s"],
        ready_timeout_s=common["load_timeout_s"],
        listener=say,
    )


def _writing(overlay: "Overlay") -> AbstractContextManager["JournalWriter"]:
    return _journal(overlay).writing(f"{who()}, process {os.getpid()},", {})


def _journal(overlay: "Overlay") -> "Journal":
    """It goes with the files; its lock does not, so that no commit has it."""
    from graftserve.k8s.rollout import JOURNAL, Journal

    folder = Path(os.path.realpath(overlay.folder))
    lock = f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.lock"
    return Journal(
        overlay.folder / JOURNAL,
        f"overlay {folder.name}",
        overlay.model(),
        lock_path=state_folder() / lock,
    )


def _see_that_it_serves(client: "Client", version: int, where: str) -> None:
    """A wrong address must not count as a bad version."""
    from graftserve.client import ClientError, VersionState

    try:
        states = {item.version: item.state for item in client.status()}
    except ClientError as error:
        raise CommandError(f"{where}: nothing is compared: {error}") from error
    if states.get(version) is not VersionState.AVAILABLE:
        raise CommandError(
            f"{where}: expected version {version} AVAILABLE, got {states.get(version, 'no such version')}: "
            "nothing is compared; is the overlay applied, and does this address lead to the right track?"
        )


def _was_begun(rollout: "Rollout") -> bool:
    """Not if its version's files were looked at and refused."""
    return rollout.outcome != "aborted" or bool(rollout.checked)


def _show(run: _Run, rollout: "Rollout", *, was_begun: bool = True) -> None:
    """was_begun: whether anything but the journal may have changed."""
    from graftserve.k8s.rollout import rollout_to_json

    tracks = run.overlay.read()
    command = f"graftserve rollout apply --overlay {shlex.quote(str(run.overlay.folder))}"
    is_to_apply = rollout.outcome != "left" and was_begun
    applied = run.cluster is not None and is_to_apply
    if rollout.outcome is not None:
        last = f"{rollout.title} {rollout.outcome}: {rollout.reason}"
    elif rollout.gate is not None and rollout.report is None:
        last = (
            f"{rollout.title} waits for its comparison: `graftserve rollout start` with --images, "
            "--target-stable and --target-canary"
        )
    else:
        last = f"{rollout.title} waits: `graftserve rollout promote` or `graftserve rollout abort`"
    lines = [*numbers(rollout), *differences(rollout)]
    lines += [f"stable     version {tracks.stable}", f"canary     {_canary(tracks)}", last]
    if is_to_apply:
        lines.append(f"applied {run.overlay.folder}" if applied else f"commit it, and apply it: {command}")
    values = rollout_to_json(rollout) | {"apply": command, "applied": applied}
    print_values(values, run.as_json, "\n".join(lines))


def _canary(tracks: "Tracks") -> str:
    if tracks.canary is None:
        return "none"
    pods = "1 pod" if tracks.replicas == 1 else f"{tracks.replicas} pods"
    return f"version {tracks.canary}, {pods}, {tracks.percent:g}% of the route's calls"
