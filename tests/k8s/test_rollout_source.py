"""`graftserve rollout --overlay` and the place that its pods pull from: files, sums, golden images."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import fsspec
import grpc
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from graftserve.cli.app import _run
from graftserve.cli.rollout_check import check_source
from graftserve.client.testing import FakeModel, FakeServer, StatusError
from graftserve.export import published
from graftserve.export.goldens import GoldenImage, write_goldens
from graftserve.export.manifest import MANIFEST, write_manifest
from graftserve.export.store import open_store
from graftserve.k8s.manifests import copy_manifests
from graftserve.k8s.rollout import CheckError, Journal, Overlay, OverlayDriver, Tracks, begin

_MEMORY = "memory://test_rollout_source/flowers"
_LABELS = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
_PROBABILITIES = (0.1, 0.2, 0.4, 0.0, 0.3)
_START = ("start", "--version", "4", "--skip-comparison")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photos: Any, encode: Any) -> Path:
    """Three photographs."""
    folder = tmp_path_factory.mktemp("images")
    for name, photo in photos.items():
        (folder / f"{name}.jpg").write_bytes(encode(photo))
    return folder


@dataclass
class Place:
    """Where versions 3 and 4 are. A version is changed in a folder of its own, which `publish` replaces."""

    source: str
    drafts: Path

    def draft(self, number: int) -> Path:
        return self.drafts / str(number)

    def publish(self, number: int) -> None:
        """Bring the draft there as it is, file by file, whatever it lacks."""
        self.remove(number)
        for path in self.draft(number).rglob("*"):
            if path.is_file():
                self._write(f"{number}/{path.relative_to(self.draft(number)).as_posix()}", path.read_bytes())

    def remove(self, number: int) -> None:
        store = open_store(self.source)
        if store.has_files(number):
            store.filesystem.rm(store.path(number), recursive=True)

    def _write(self, name: str, content: bytes) -> None:
        store = open_store(self.source)
        path = f"{store.root}/{name}"
        store.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        store.filesystem.pipe_file(path, content)


def _draft(folder: Path, images: Path) -> None:
    (folder / "variables").mkdir(parents=True)
    (folder / "assets.extra").mkdir()
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "variables.index").write_bytes(b"index")
    goldens = [
        GoldenImage(path.name, path.read_bytes(), None, _PROBABILITIES) for path in sorted(images.iterdir())
    ]
    write_goldens(folder, goldens)
    write_manifest(folder)


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, images: Path, tmp_path: Path) -> Iterator[Place]:
    source = str(tmp_path / "models" / "flowers") if request.param == "folder" else _MEMORY
    place = Place(source, tmp_path / "drafts")
    for number in (3, 4):
        _draft(place.draft(number), images)
        place.publish(number)
    yield place
    if request.param == "store":
        fsspec.filesystem("memory").rm("/test_rollout_source", recursive=True)


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Production with version 3; its place is for the test to say."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = copy_manifests("production", tmp_path / "deploy")
    _set_source(folder, "/source/flowers")
    return folder


def _set_source(overlay: Path, source: str) -> None:
    (overlay / "stable.env").write_text(f"MODEL_NAME=flowers\nMODEL_SOURCE={source}\nMODEL_VERSION=3\n")


@pytest.fixture
def rollout(overlay: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """rollout(command, *args) -> (exit status, stdout, stderr), in this process, with --overlay."""

    def rollout(command: str, *args: str | Path) -> tuple[int, str, str]:
        status = _run(["rollout", command, "--overlay", str(overlay), *map(str, args)])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return rollout


def _tracks(overlay: Path) -> tuple[str, str]:
    return (overlay / "stable.env").read_text(), (overlay / "canary.env").read_text()


def _assert_refused(rollout: Command, overlay: Path, message: str, *start: str) -> None:
    before = _tracks(overlay)
    status, out, err = rollout(*(start or _START))
    assert status == 1
    assert f" aborted: {message}" in out
    assert f"abort: {message}" in err
    assert "Traceback" not in err
    assert "apply" not in out
    assert _tracks(overlay) == before
    record = json.loads((overlay / "rollouts.json").read_text())
    assert record["current"] is None
    assert record["history"][-1]["reason"].startswith(message)


# Before a file is changed


def test_a_whole_version_goes_on(rollout: Command, overlay: Path, place: Place) -> None:
    _set_source(overlay, place.source)
    status, out, err = rollout(*_START, "--json")
    assert status == 0
    count = len((place.draft(4) / MANIFEST).read_text().splitlines())
    seen = (
        f"{count} files of its manifest are there, their sums are for the pods to check"
        if place.source == _MEMORY
        else f"{count} files with the sums of the manifest"
    )
    assert err.startswith(f"check version 4\nversion 4: {seen}\ncanary.env: ")
    assert json.loads(out)["checked"] == seen


def test_a_version_that_is_looked_at_once_is_not_looked_at_again(
    rollout: Command, overlay: Path, place: Place
) -> None:
    _set_source(overlay, place.source)
    assert rollout(*_START)[0] == 0
    place.remove(4)
    status, _, err = rollout(*_START, "--weight", "5")
    assert (status, "check" in err) == (0, False)
    assert rollout("promote")[0] == 0


@pytest.mark.parametrize("suffix", ["", "/"])
def test_a_missing_version_is_refused_with_those_that_are_there(
    rollout: Command, overlay: Path, place: Place, suffix: str
) -> None:
    _set_source(overlay, place.source + suffix)
    message = f"{place.source}: version 44 is not there, or not complete; complete versions: 3, 4"
    _assert_refused(rollout, overlay, message, "start", "--version", "44", "--auto", "--skip-comparison")
    status, out, _ = rollout(*_START, "--json")  # it is over, and the next one is free to begin
    assert (status, json.loads(out)["number"]) == (0, 2)
    assert f"    {message}\n" in rollout("history")[1]


def test_another_version_than_the_place_is_of(rollout: Command, overlay: Path, place: Place) -> None:
    _set_source(overlay, f"{place.source}/3")
    _assert_refused(rollout, overlay, f"{place.source}/3: is version 3, not 4; leave one of the two out")


def test_a_version_that_no_manifest_completes_is_refused(
    rollout: Command, overlay: Path, place: Place
) -> None:
    """As a plain SavedModel has none: no pod would pull it."""
    _set_source(overlay, place.source)
    (place.draft(4) / MANIFEST).unlink()
    place.publish(4)
    message = f"{place.source}: version 4 is not there, or not complete; complete versions: "
    _assert_refused(rollout, overlay, f"{message}3")
    place.remove(3)
    _assert_refused(rollout, overlay, f"{message}none")


def test_a_version_without_one_of_its_files_is_refused(rollout: Command, overlay: Path, place: Place) -> None:
    _set_source(overlay, place.source)
    (place.draft(4) / "saved_model.pb").unlink()
    place.publish(4)
    message = (
        f"{place.source}/4: saved_model.pb is missing there; the version is damaged"
        if place.source == _MEMORY
        else f"{place.source}/4: missing: saved_model.pb; publish or pull the version again"
    )
    _assert_refused(rollout, overlay, message)


def test_a_damaged_manifest_is_refused(rollout: Command, overlay: Path, place: Place) -> None:
    _set_source(overlay, place.source)
    (place.draft(4) / MANIFEST).write_text("<html>")
    place.publish(4)
    _assert_refused(rollout, overlay, f"{place.source}/4/{MANIFEST}, line 1: expected a SHA-256 sum")


def test_a_changed_file_is_seen_where_all_is_read(rollout: Command, overlay: Path, place: Place) -> None:
    _set_source(overlay, place.source)
    (place.draft(4) / "saved_model.pb").write_bytes(b"grapf")
    place.publish(4)
    if place.source == _MEMORY:
        assert rollout(*_START)[0] == 0
    else:
        _assert_refused(rollout, overlay, f"{place.source}/4: changed: saved_model.pb")


def test_an_interrupted_rollout_looks_when_it_goes_on(rollout: Command, overlay: Path, place: Place) -> None:
    from graftserve.cli.rollout_overlay import _journal

    _set_source(overlay, place.source)
    place.remove(4)
    there = Overlay(overlay)
    for _ in range(2):
        with _journal(there).writing("the test", {}) as writer:
            begin(there, writer, version=4, gate=None)
        _assert_refused(rollout, overlay, f"{place.source}: version 4 is not there")
        place.publish(4)
        with _journal(there).writing("the test", {}) as writer:
            begin(there, writer, version=4, gate=None)
        status, _, err = rollout(*_START)
        assert status == 0
        assert err.startswith("going on with rollout ")
        assert "\nversion 4: " in err
        assert rollout("abort")[0] == 0
        place.remove(4)


def test_an_interrupted_rollout_is_aborted_without_a_look(
    rollout: Command, overlay: Path, place: Place
) -> None:
    from graftserve.cli.rollout_overlay import _journal

    _set_source(overlay, place.source)
    with _journal(Overlay(overlay)).writing("the test", {}) as writer:
        begin(Overlay(overlay), writer, version=44, gate=None)
    status, out, err = rollout("abort", "-m", "a typo")
    assert (status, err) == (0, "")
    assert "aborted: a typo\n" in out


def test_no_way_back_to_a_version_that_is_gone(rollout: Command, overlay: Path, place: Place) -> None:
    _set_source(overlay, place.source)
    assert rollout(*_START, "--auto")[0] == 0
    place.remove(3)
    _assert_refused(rollout, overlay, f"{place.source}: version 3 is not there", "undo")
    place.publish(3)
    assert rollout("undo")[0] == 0
    assert "MODEL_VERSION=3\n" in _tracks(overlay)[0]


def test_what_is_refused_is_not_applied(overlay: Path, tmp_path: Path) -> None:
    def refuse(version: int) -> str:
        raise CheckError("no such version")

    class Place:
        def __init__(self) -> None:
            self.settled: list[Tracks] = []

        def observe(self) -> Tracks | None:
            return None

        def settle(self, tracks: Tracks) -> None:
            self.settled.append(tracks)

    there, place = Overlay(overlay), Place()
    with Journal(tmp_path / "journal.json", "overlay", "flowers").writing("the test", {}) as writer:
        begin(there, writer, version=4, gate=None, auto=True)
        ended = OverlayDriver(there, writer, check=refuse, cluster=place).run()
    assert (ended.outcome, ended.reason, place.settled) == ("aborted", "no such version", [])


# What cannot be seen from here


def _assert_not_checked(rollout: Command, overlay: Path, why: str, *options: str) -> None:
    status, out, err = rollout(*_START, "--json", *options)
    assert status == 0
    lines = err.splitlines()
    assert lines[:1] == ["check version 4"]
    assert lines[1].startswith(f"version 4: not checked here: {why}")
    assert lines[2].startswith("canary.env: MODEL_VERSION=4")
    assert f"version 4: {json.loads(out)['checked']}" == lines[1]
    assert rollout("abort")[0] == 0


def test_a_path_in_the_pods_is_not_checked(
    rollout: Command, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tmp_path / "source" / "flowers"
    (tmp_path / "flowers" / "3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in (f"{claim}", f"{claim}/4", f"file://{claim}", "flowers"):  # the last one is here by chance
        _set_source(overlay, source)
        _assert_not_checked(rollout, overlay, f"{source} is not on this machine")


def test_a_place_that_seems_empty_is_not_checked(rollout: Command, overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), "memory://test_rollout_source/nowhere"):
        _set_source(overlay, source)
        _assert_not_checked(rollout, overlay, f"{source} holds no version that can be seen from here")


def test_a_place_that_nothing_here_can_read_is_not_checked(
    rollout: Command, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    _set_source(overlay, "s3://models/flowers")
    _assert_not_checked(rollout, overlay, "s3://models/flowers: what reads s3:// is not installed")
    _set_source(overlay, "gopher://models/flowers")
    _assert_not_checked(rollout, overlay, "gopher://models/flowers: cannot be reached: Protocol")
    (overlay / "stable.env").write_text("MODEL_NAME=flowers\nMODEL_VERSION=3\n")
    _assert_not_checked(rollout, overlay, "there is no MODEL_SOURCE")


class Away(MemoryFileSystem):
    """A store that fails; each test says how."""

    protocol = "away"
    failure: Exception | None = None
    returns = Event()

    def info(self, path: str, **options: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        self.returns.wait()
        return super().info(path, **options)


@pytest.fixture
def away(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Away]]:
    fsspec.register_implementation("away", Away, clobber=True)
    monkeypatch.setattr(published, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(Away, "failure", None)
    monkeypatch.setattr(Away, "returns", Event())
    _set_source(overlay, "away://models/flowers")
    yield Away
    Away.returns.set()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ConnectionError("Could not connect"), "away://models/flowers: Could not connect"),
        (PermissionError("Forbidden"), "away://models/flowers: Forbidden"),
        (RuntimeError("Unable to locate credentials"), "away://models/flowers: Unable to locate credentials"),
    ],
)
def test_a_store_that_fails_is_not_checked(
    rollout: Command, overlay: Path, away: type[Away], failure: Exception, message: str
) -> None:
    away.failure = failure
    _assert_not_checked(rollout, overlay, message)


def test_a_store_that_does_not_answer_is_not_waited_for(
    rollout: Command, overlay: Path, away: type[Away]
) -> None:
    _assert_not_checked(rollout, overlay, "it took longer than 0.2 s; --timeout-s", "--timeout-s", "0.2")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("closed", [".", "4/saved_model.pb"])
def test_files_of_somebody_else_are_not_checked(images: Path, closed: str) -> None:
    with TemporaryDirectory() as directory:  # pytest's own is closed to others
        Path(directory).chmod(0o755)
        folder = Path(directory, "flowers")
        _draft(folder / "4", images)
        (folder / closed).chmod(0o600)
        os.seteuid(65534)
        try:
            seen = check_source(str(folder), 4, 20)
        finally:
            os.seteuid(0)
    assert seen.startswith(f"not checked here: {folder}")
    assert "Permission denied" in seen


# Golden images


def _probabilities(image: bytes) -> dict[str, float]:
    return dict(zip(_LABELS, _PROBABILITIES, strict=True))


def _shifted(image: bytes) -> dict[str, float]:
    """Within the gate, but not what the files say."""
    return _probabilities(image) | {"roses": 0.35, "tulips": 0.35 - 1e-9}


def _unable(image: bytes) -> dict[str, float]:
    raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "no images, please")


def _away(image: bytes) -> dict[str, float]:
    raise StatusError(grpc.StatusCode.UNAVAILABLE, "back soon")


@pytest.fixture
def compare(rollout: Command, images: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """compare(answer of version 4) -> what `start` gives that compares, and what it asked of version 4."""
    paths = tmp_path / "compared"
    paths.mkdir()
    shutil.copy(min(images.iterdir()), paths / "one.jpg")

    def compare(answer: Callable[[bytes], Any], *options: str) -> tuple[int, str, str, list[list[bytes]]]:
        stable, canary = FakeModel(answer=_probabilities), FakeModel(answer=answer)
        for version, model in ((3, stable), (4, canary)):
            model.versions.clear()
            model.set_version(version)
        with FakeServer(stable) as old, FakeServer(canary) as new:
            result = rollout(
                *("start", "--version", "4", "--images", paths, "--max-latency-ratio", "1000"),
                *("--target-stable", old.target, "--target-canary", new.target, *options),
            )
            return *result, [list(batch) for batch in new.batches]

    return compare


def test_goldens_that_agree_come_first(
    compare: Callable[..., Any], overlay: Path, place: Place, images: Path
) -> None:
    _set_source(overlay, place.source)
    status, out, err, asked = compare(_probabilities, "--auto")
    assert status == 0, err
    goldens = [path.read_bytes() for path in sorted(images.iterdir())]
    assert asked[:4] == [*([golden] for golden in goldens), goldens]
    assert "promoted: the gate is passed\n" in out
    assert "golden" not in err


def test_goldens_that_differ_abort(compare: Callable[..., Any], overlay: Path, place: Place) -> None:
    _set_source(overlay, place.source)
    status, out, err, asked = compare(_shifted, "--auto")
    assert status == 1
    reason = (
        "version 4 differs by 0.05 from what its golden image rocket.jpg must give, at most 0.001 allowed"
    )
    assert f"abort: {reason}" in err
    assert f" aborted: {reason}" in out
    assert len(asked) == 4  # nothing was compared any more
    assert "MODEL_VERSION=\n" in _tracks(overlay)[1]
    assert "MODEL_VERSION=3\n" in _tracks(overlay)[0]


def test_a_canary_that_takes_no_golden_image_is_aborted(
    compare: Callable[..., Any], overlay: Path, place: Place
) -> None:
    _set_source(overlay, place.source)
    status, out, _, _ = compare(_unable)
    assert status == 1
    assert " aborted: golden images of version 4: INVALID_ARGUMENT" in out


def test_a_canary_that_is_away_is_no_bad_version(
    compare: Callable[..., Any], rollout: Command, overlay: Path, place: Place
) -> None:
    _set_source(overlay, place.source)
    status, out, err, _ = compare(_away)
    assert (status, out) == (1, "")
    assert "Error: " in err
    assert "UNAVAILABLE" in err
    assert json.loads(rollout("status", "--json")[1])["current"]["version"] == 4
    assert compare(_probabilities, "--auto")[0] == 0


def test_goldens_that_were_changed_abort(compare: Callable[..., Any], overlay: Path, place: Place) -> None:
    _set_source(overlay, place.source)
    assert compare(_away)[0] == 1  # the canary is there
    (place.draft(4) / "assets.extra" / "goldens" / "rocket.jpg").write_bytes(b"another")
    place.publish(4)
    status, out, _, asked = compare(_probabilities)
    assert status == 1
    where = f"{place.source}/4/assets.extra/goldens/rocket.jpg"
    assert f" aborted: {where}: has not the sum that its manifest gives" in out
    assert asked == []


def test_a_version_without_goldens_is_compared_without(
    compare: Callable[..., Any], overlay: Path, place: Place
) -> None:
    _set_source(overlay, place.source)
    shutil.rmtree(place.draft(4) / "assets.extra" / "goldens")
    write_manifest(place.draft(4))
    place.publish(4)
    status, out, err, _ = compare(_probabilities)
    assert status == 0
    assert "\ncompared without golden images: version 4 has none that graftserve export wrote\n" in err
    assert "agreement  1.0000\n" in out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/source/flowers", "/source/flowers is not on this machine"),
        ("away://models/flowers", "away://models/flowers: Could not connect"),
    ],
)
def test_goldens_that_cannot_be_had_are_left_out(
    compare: Callable[..., Any], overlay: Path, away: type[Away], source: str, message: str
) -> None:
    away.failure = ConnectionError("Could not connect")
    _set_source(overlay, source)
    status, out, err, _ = compare(_shifted)
    assert status == 0, err
    assert f"\ncompared without golden images: {message}\n" in err
    assert "agreement  1.0000\n" in out
