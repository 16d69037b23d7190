"""`graftserve rollout`: a new version beside the old one, compared, promoted or taken back."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .connection import Connection, access_options
from .output import CommandError, say
from .rollout_check import check_folder, check_goldens
from .rollout_output import (
    compare_shown,
    end,
    next_command,
    numbers,
    or_none,
    print_values,
    sample_images,
    show,
    show_history,
    state_folder,
    who,
)

if TYPE_CHECKING:
    from graftserve.client import Client
    from graftserve.k8s.rollout import (
        Driver,
        Journal,
        JournalWriter,
        ModelConfigFile,
        ModelServer,
        Record,
        Report,
    )

__all__ = ["command"]

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

# Parameters that make no sense with --overlay, and those that make none without.
_SERVER_ONLY = frozenset(
    [
        "target",
        "model",
        "config_file",
        "only_model",
        "base_path",
        "state",
        "previous",
        "server_allows_labels",
        "drain_s",
    ]
)
_OVERLAY_ONLY = frozenset(
    [
        "replicas",
        "weight",
        "ramp",
        "hold_s",
        "target_stable",
        "target_canary",
        "apply_it",
        "context",
        "ask_cluster",
    ]
)


def _percents(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected percentages such as 1,10,50, got {value!r}") from error


def _seconds(name: str, default_s: float, words: str) -> Callable[[CommandT], CommandT]:
    positive = click.FloatRange(min=0, min_open=True)
    return click.option(name, type=positive, default=default_s, show_default=True, help=words)


def _context(command: CommandT) -> CommandT:
    return click.option(
        "--context", default="", help="Of the kubeconfig, for the cluster.  [default: the current one]"
    )(command)


def _options(command: CommandT) -> CommandT:
    """What names the server, the model and the journal; or the overlay."""
    options = (
        click.option(
            "--overlay",
            type=click.Path(path_type=Path, file_okay=False),
            help="Change this Kustomize overlay's stable.env and canary.env, for Kubernetes, instead of a "
            "server.",
        ),
        click.option(
            "--target", default="localhost:8500", show_default=True, help="gRPC address of one server."
        ),
        click.option("--model", help="Name of the model; an --overlay has it."),
        click.option(
            "--model-config-file",
            "config_file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The file that the server has as --model_config_file. The model's versions and labels are "
            "changed in it, all else stays.",
        ),
        click.option(
            "--only-model",
            is_flag=True,
            help="The server has no such file and just this model: others would be unloaded.",
        ),
        click.option(
            "--model-base-path",
            "base_path",
            help="With --only-model: the model's folder, as the server sees it.",
        ),
        click.option(
            "--state",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Where the rollouts are written down.  [default: beside the --model-config-file, or below "
            "~/.local/state/graftserve/rollouts]",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _run_options(command: CommandT) -> CommandT:
    """What the commands that change something have, too."""
    options = (
        click.option("-m", "--message", default="", help="Why; kept in the history."),
        _seconds(
            "--timeout-s",
            30.0,
            "Seconds that a request may take, retries included; a look at the --overlay's source, too.",
        ),
        _seconds(
            "--load-timeout-s",
            600.0,
            "Seconds until a version must be AVAILABLE, or unloaded; with --apply, until pods must be ready.",
        ),
        click.option(
            "--drain-s",
            type=click.FloatRange(min=0),
            default=5.0,
            show_default=True,
            help="Seconds from the moment a version has no label to its unloading.",
        ),
        _seconds(
            "--patience-s",
            60.0,
            "Seconds that a server may be away, as in a restart; with --apply, the API server.",
        ),
        click.option(
            "--apply",
            "apply_it",
            is_flag=True,
            help="With --overlay: apply it to the cluster, and wait until the pods of both tracks are ready.",
        ),
        _context,
    )
    for option in reversed(options):
        command = option(command)
    return command


def _by_place(server_command: Callable[..., None]) -> Callable[..., None]:
    """With --overlay, call the function of the same name in `rollout_overlay` instead."""

    @wraps(server_command)
    def choose(overlay: Path | None, **values: Any) -> None:
        ctx = click.get_current_context()
        given = {name for name in values if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        excluded = _OVERLAY_ONLY if overlay is None else _SERVER_ONLY
        if wrong := given & excluded:
            option = next(item.opts[0] for item in ctx.command.params if item.name == min(wrong))
            there = "belongs to" if overlay is None else "does not go with"
            raise click.UsageError(f"{option} {there} --overlay")
        values = {name: value for name, value in values.items() if name not in excluded}
        if overlay is not None:
            from . import rollout_overlay

            if server_command.__name__ != "start" and values.pop("connection", Connection()) != Connection():
                raise click.UsageError("--tls and --header do not go with --overlay: no server is asked")
            getattr(rollout_overlay, server_command.__name__)(overlay, **values)
            return
        if values["model"] is None:
            raise click.UsageError("Missing option '--model', or --overlay.")
        server_command(**values)

    return choose


@click.group("rollout")
def command() -> None:
    """Bring a version into service, compared with the one before, and take it back if need be.

    On a running server, TensorFlow Serving or graftserve serve, it is loaded beside the version labelled
    "stable", gets the label "canary", and is compared on your images. If it passes, the label "stable" moves
    to it and the old version is unloaded; if not, it is taken away again.

    Callers must ask for the label (Client(..., version_label="stable")): those who name no version get the
    highest one that is loaded, which is the canary.

    On Kubernetes, --overlay DIR names an overlay of graftserve's manifests. Its stable.env and canary.env are
    changed, a diff to review and commit; its rollouts.json says what was done. --apply applies it, too, and
    waits for the pods.

    Interrupted anywhere, the same command goes on. The exit status is 0 when it is done or waits for
    "promote", 1 when it was aborted or failed.
    """


@command.command("start")
@_options
@click.option("--version", type=click.IntRange(min=0), required=True, help="The version to bring.")
@click.option(
    "--from", "previous", type=click.IntRange(min=0), help="The one that is stable, if nothing is labelled."
)
@click.option(
    "--images",
    multiple=True,
    metavar="DIR|GLOB",
    help="Images to compare the two versions on, as for graftserve classify; may be given several times.",
)
@click.option("--skip-comparison", is_flag=True, help="Compare nothing.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="How many of the images, chosen at random.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which ones.")
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    default=0.98,
    show_default=True,
    help="The share of images that must get the same class.",
)
@click.option(
    "--max-shift",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="How far the score of a class may move on any image.",
)
@click.option(
    "--max-latency-ratio",
    type=click.FloatRange(min=0, min_open=True),
    default=1.5,
    show_default=True,
    help="Median latency, new by old.",
)
@click.option(
    "--max-errors",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many images only the new version may fail on.",
)
@click.option(
    "--server-allows-labels",
    is_flag=True,
    help="The server runs with --allow_version_labels_for_unavailable_models; needed where its file has no "
    "labels yet.",
)
@click.option(
    "--replicas", type=click.IntRange(min=0), help="With --overlay: the canary's pods.  [default: 1]"
)
@click.option(
    "--weight",
    type=click.IntRange(0, 100),
    help="With --overlay: the percentage of calls that the route gives the canary; again, to move it."
    "  [default: 0]",
)
@click.option(
    "--ramp",
    metavar="PERCENT,...",
    callback=_percents,
    help="With --overlay and --apply, instead of --weight: percentages of the calls that the route gives the "
    "canary one after the other, such as 1,10,50. It is compared again after each.",
)
@click.option(
    "--hold-s",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    help="With --ramp: seconds that each of them lasts at least.",
)
@click.option(
    "--target-stable",
    help="With --overlay and --images: gRPC address of the stable track.  [default: a port-forward, with "
    "--apply]",
)
@click.option(
    "--target-canary",
    help="With --overlay and --images: gRPC address of the canary track.  [default: as above]",
)
@click.option("--auto", is_flag=True, help="Promote at once if the comparison is passed.")
@_run_options
@access_options
@_by_place
def start(
    version: int,
    previous: int | None,
    images: tuple[str, ...],
    skip_comparison: bool,
    sample: int,
    seed: int,
    min_agreement: float,
    max_shift: float,
    max_latency_ratio: float,
    max_errors: int,
    server_allows_labels: bool,
    auto: bool,
    **common: Any,
) -> None:
    """Load a version, compare it, and wait for "promote"; with --auto, promote it.

    Where no version is stable yet, the only one that the server has is labelled so.

    \b
    Example:
      graftserve rollout start --target localhost:8500 --model flowers --version 4 \\
        --model-config-file models.config --images photos/
      graftserve rollout start --overlay k8s/overlays/production --version 4 --apply --images photos/ \\
        --ramp 1,10,50
    """
    from graftserve.k8s.rollout import AlreadyStableError, Gate, begin

    if skip_comparison == bool(images):
        raise click.UsageError("expected --images to compare the versions on, or --skip-comparison")
    gate = None if skip_comparison else Gate(min_agreement, max_shift, max_latency_ratio, max_errors)
    chosen = sample_images(images, sample, seed)
    with _opened(common) as run:
        if not server_allows_labels and run.config_file is not None and not run.config_file.has_labels():
            raise CommandError(
                f"{run.config_file.path} has no labels yet. No server starts from a file with labels "
                "unless it has --allow_version_labels_for_unavailable_models: start yours with that, then "
                "say --server-allows-labels here"
            )

        def shadow(canary: int, stable: int) -> "Report":
            timeout_s = common["timeout_s"]
            with run.stage.client(stable, timeout_s) as old, run.stage.client(canary, timeout_s) as new:
                run.check_goldens(canary, new)
                return compare_shown(old, new, chosen, seed=seed, max_errors=max_errors)

        current = run.writer.record.current
        if current is not None and current.version == version and current.kind == "rollout":
            say(f"going on with {current.title}")
            run.writer.update(replace(current, gate=gate, auto=auto))
        else:
            try:
                begin(
                    run.stage,
                    run.writer,
                    version=version,
                    previous=previous,
                    gate=gate,
                    auto=auto,
                    by=who(),
                    note=common["message"],
                )
            except AlreadyStableError as error:
                print_values({"outcome": "promoted", "version": version}, common["as_json"], f"{error}")
                return
        rollout = run.driver(shadow).run()
    show(rollout, common["as_json"])
    end(rollout.outcome != "aborted")


@command.command("promote")
@_options
@_run_options
@access_options
@_by_place
def promote(**common: Any) -> None:
    """Make the canary stable and unload the version before.

    \b
    Example: graftserve rollout promote --model flowers --model-config-file models.config
    """
    from graftserve.k8s.rollout import Decision, decide

    with _opened(common) as run:
        decide(run.writer, Decision.PROMOTE, common["message"] or f"promoted by {who()}")
        rollout = run.driver().run()
    show(rollout, common["as_json"])
    end(rollout.outcome == "promoted")


@command.command("abort")
@_options
@click.option(
    "--leave",
    "leave_it",
    is_flag=True,
    help="Only forget the rollout: server and configuration stay as somebody else has made them.",
)
@_run_options
@access_options
@_by_place
def abort(leave_it: bool, **common: Any) -> None:
    """Give the label "stable" back to the version before, and unload the new one.

    \b
    Example: graftserve rollout abort --model flowers --model-config-file models.config -m "wrong labels"
    """
    from graftserve.k8s.rollout import Decision, decide, leave

    reason = common["message"] or f"aborted by {who()}"
    with _opened(common) as run:
        if leave_it:
            rollout = leave(run.writer, reason)
        else:
            decide(run.writer, Decision.ABORT, reason)
            rollout = run.driver().run()
    show(rollout, common["as_json"])
    end(rollout.outcome != "promoted")


@command.command("undo")
@_options
@_run_options
@access_options
@_by_place
def undo(**common: Any) -> None:
    """Bring the version before the last promoted one back. Undoing that goes forward again.

    \b
    Example: graftserve rollout undo --model flowers --model-config-file models.config
    """
    from graftserve.k8s.rollout import begin_undo

    with _opened(common) as run:
        current = run.writer.record.current
        if current is None or current.kind != "undo":
            begin_undo(run.stage, run.writer, by=who(), note=common["message"])
        else:
            say(f"going on with {current.title}")
        rollout = run.driver().run()
    show(rollout, common["as_json"])
    end(rollout.outcome == "promoted")


@command.command("status")
@_options
@_seconds("--timeout-s", 10.0, "Seconds to wait for the server.")
@click.option("--cluster", "ask_cluster", is_flag=True, help="With --overlay: look at the cluster, too.")
@_context
@access_options
@_by_place
def status(timeout_s: float, as_json: bool, **place: Any) -> None:
    """Show what is under way, what the server has, and whether somebody else has changed it.

    The exit status is 1 if somebody has, or if the server does not answer; with --cluster, also if it is not
    as the overlay's files say, or not all pods are ready.

    \b
    Example:
      graftserve rollout status --model flowers --model-config-file models.config
      graftserve rollout status --overlay k8s/overlays/production --cluster
    """
    from graftserve.client import ClientError
    from graftserve.k8s.rollout import Observed, conflict, rollout_to_json

    record = _journal(place).read()
    current = record.current
    error = changed = None
    try:
        with _stage(place, _how(place, record), timeout_s) as stage:
            observed = stage.observe()
        changed = None if current is None else conflict(current, observed)
    except ClientError as exc:
        observed, error = Observed(), place["connection"].explained(str(exc))
    versions = [
        {"version": item.version, "state": str(item.state), "error_message": item.error_message}
        for _, item in sorted(observed.versions.items(), reverse=True)
    ]
    values = {
        "target": place["target"],
        "model": place["model"],
        "stable": observed.stable,
        "canary": observed.canary,
        "versions": versions,
        "error": error,
        "conflict": changed,
        "current": None if current is None else rollout_to_json(current),
    }
    lines = (
        [error]
        if error
        else [
            f"stable     {or_none(observed.stable)}",
            f"canary     {or_none(observed.canary)}",
            *(
                f"version {item['version']}  {item['state']}  {item['error_message']}".rstrip()
                for item in versions
            ),
        ]
    )
    if current is None:
        lines.append("no rollout is under way")
    else:
        lines += [
            f"{current.title}, begun {current.started_at} by {current.by or 'unknown'}",
            *numbers(current),
        ]
        lines.append(f"next: {next_command(current)}")
    if changed:
        lines.append(f"somebody else changed the server: {changed}")
    print_values(values, as_json, "\n".join(lines))
    end(not changed and not error)


@command.command("apply")
@click.option(
    "--overlay",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The Kustomize overlay.",
)
@_context
@click.option(
    "--take-over",
    multiple=True,
    metavar="MANAGER",
    help="Make fields this command's that so far belong to this field manager, such as "
    "kubectl-client-side-apply, which is `kubectl apply`; may be given several times.",
)
@_seconds("--timeout-s", 30.0, "Seconds that a request may take.")
@_seconds("--load-timeout-s", 600.0, "Seconds until a track's pods must be ready.")
@_seconds("--patience-s", 60.0, "Seconds that the API server may be away.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def apply(folder: Path, **options: Any) -> None:
    """Apply an overlay to its cluster as its files are, and wait for its pods: for the first time, or after
    changes that came without --apply.

    Fields become those of the manager graftserve-rollout. What another manager owns is reported, and nothing
    is changed then.

    \b
    Example: graftserve rollout apply --overlay k8s/overlays/production
    """
    from . import rollout_overlay

    rollout_overlay.apply(folder, **options)


@command.command("history")
@_options
@_by_place
def history(as_json: bool, **place: Any) -> None:
    """List the rollouts of a model on a server: who, when, why, and what the comparison said.

    \b
    Example: graftserve rollout history --model flowers --model-config-file models.config
    """
    show_history({"target": place["target"], "model": place["model"]}, _journal(place).read(), as_json)


class _Run:
    """The server, the journal with its lock, and what makes the driver of the two."""

    def __init__(
        self, common: dict[str, Any], stage: "ModelServer", writer: "JournalWriter", how: "_How"
    ) -> None:
        self.stage = stage
        self.writer = writer
        self.config_file = how.config_file
        self._how = how
        self._common = common

    @property
    def _base_path(self) -> str:
        return self._how.base_path if self.config_file is None else self.config_file.base_path()

    def driver(self, shadow: "Callable[[int, int], Report] | None" = None) -> "Driver":
        from graftserve.k8s.rollout import Driver, Limits

        return Driver(
            self.stage,
            self.writer,
            check=self._check,
            shadow=shadow,
            listener=lambda text: say(self._common["connection"].explained(text)),
            limits=Limits(self._common["load_timeout_s"], self._common["drain_s"]),
            patience_s=self._common["patience_s"],
            is_lasting=lambda error: Connection.is_refused(str(error)),
        )

    def check_goldens(self, version: int, client: "Client") -> None:
        """Ask for the version's golden images, where its files are on this machine and have some."""
        folder = Path(self._base_path, str(version))
        check_goldens(folder, client, version=version, model=self._common["model"])

    def _check(self, version: int) -> str:
        """Look at the version's files, where they are on this machine; the server decides in any case."""
        base = Path(self._base_path)
        if not base.is_dir():
            return f"{base} is not on this machine, its files are not checked"
        return check_folder(base / str(version))


@dataclass(frozen=True)
class _How:
    """The server's file, or else the base path of its only model."""

    config_file: "ModelConfigFile | None"
    base_path: str = ""


@contextmanager
def _opened(common: dict[str, Any]) -> "Iterator[_Run]":
    journal = _journal(common)
    how = _how(common, journal.read())
    path = "" if how.config_file is None else str(how.config_file.path)
    settings = {"model_config_file": path, "model_base_path": how.base_path}
    with (
        journal.writing(f"{who()}, process {os.getpid()},", settings) as writer,
        _stage(common, how, common["timeout_s"]) as stage,
    ):
        try:
            yield _Run(common, stage, writer, how)
        except KeyboardInterrupt:
            say("interrupted: the same command goes on, `graftserve rollout abort` goes back")
            raise


def _how(place: dict[str, Any], record: "Record") -> _How:
    """As the options say, or as they said last time."""
    from graftserve.k8s.rollout import ModelConfigFile

    config_file, base_path = place["config_file"], place["base_path"]
    if config_file is not None and (place["only_model"] or base_path):
        raise click.UsageError("--model-config-file and --only-model exclude each other")
    if place["only_model"] != bool(base_path):
        raise click.UsageError(
            "--only-model and --model-base-path belong together: a reload tells the server all that it has"
        )
    if config_file is None and not base_path:
        settings = record.settings or {}
        config_file = settings.get("model_config_file") or None
        base_path = settings.get("model_base_path") or ""
    if config_file is not None:
        return _How(ModelConfigFile(Path(os.path.abspath(config_file)), place["model"]))
    if base_path:
        return _How(None, base_path)
    raise click.UsageError(
        f"no rollout of {place['model']} at {place['target']} is known here: name the server's "
        "--model-config-file; or, if it has just this model, give --only-model and --model-base-path"
    )


def _stage(place: dict[str, Any], how: _How, timeout_s: float) -> "ModelServer":
    from graftserve.k8s.rollout import ModelServer

    config, arguments = how.config_file or how.base_path, place["connection"].client_arguments()
    return ModelServer(place["target"], place["model"], config, timeout_s=timeout_s, **arguments)


def _journal(place: dict[str, Any]) -> "Journal":
    from graftserve.k8s.rollout import Journal

    target, model = place["target"], place["model"]
    path = place["state"]
    if path is None:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{target}-{model}") + ".json"
        if place["config_file"] is not None:
            config_file = Path(os.path.abspath(place["config_file"]))
            path = config_file.with_name(f"{config_file.name}.rollouts") / name
        else:
            path = state_folder() / name
    return Journal(path, target, model)
