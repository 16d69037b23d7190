"""Is a version what it should be, as far as its files tell: sums, and golden images asked of a server.

Its files are in a folder, which may be on this machine or not, or where an overlay's pods pull them from.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from .output import CommandError, say

if TYPE_CHECKING:
    from graftserve.client import Client
    from graftserve.export.published import Published

__all__ = ["check_folder", "check_goldens", "check_source", "check_source_goldens"]

T = TypeVar("T")


def check_folder(folder: Path) -> str:
    """Look at all files of the version in `folder`; says what it looked at.

    Raises CheckError if there is no version, or it is damaged.
    """
    from graftserve.export.errors import ManifestError
    from graftserve.export.manifest import MANIFEST
    from graftserve.k8s.rollout import CheckError

    if not folder.is_dir():
        raise CheckError(f"{folder}: there is no such version")
    if not (folder / MANIFEST).is_file():
        if not (folder / "saved_model.pb").is_file():
            raise CheckError(f"{folder}: expected a saved_model.pb, got none")
        return "it has no sums to check"
    try:
        return _check_sums(folder)
    except ManifestError as error:
        raise CheckError(str(error)) from error


def check_goldens(folder: Path, client: "Client", *, version: int, model: str) -> bool:
    """Ask for the golden images of the version in `folder`; False if none can be read there.

    Raises CheckError if the answers are not those of the version, RetryError if there is none for now.
    """
    from graftserve.client import ClientError, RetryError
    from graftserve.export.errors import VerificationError
    from graftserve.export.goldens import read_goldens
    from graftserve.k8s.rollout import CheckError

    from .replay import replay

    try:
        read_goldens(folder)
    except VerificationError:
        return False  # not a version of graftserve export; the sums have told whether one is damaged
    try:
        result = replay(folder, client, model)
    except RetryError:
        raise
    except (CommandError, ClientError) as error:  # an answer that cannot be that of these files
        raise CheckError(f"golden images of version {version}: {error}") from error
    if not result.largest_difference <= result.tolerance:
        raise CheckError(
            f"version {version} differs by {result.largest_difference:.3g} from what its golden image "
            f"{result.worst} must give, at most {result.tolerance:g} allowed: another model answers"
        )
    return True


def check_source(source: str, version: int, timeout_s: float) -> str:
    """Look at a version where pods pull it from, an object store or a folder; says what it looked at, or why
    it could not: pods may see what this machine does not.

    Sums are checked in a folder only: a store would have to send all of it.
    Raises CheckError if the version is missing, where others are not, or damaged.
    """
    from graftserve.export.errors import ManifestError, StoreError, VersionError
    from graftserve.export.store import is_url
    from graftserve.k8s.rollout import CheckError

    def look() -> str:
        published = _find(source, version)
        if not is_url(source):
            return _check_sums(Path(published.store.path(version)))
        return (
            f"{len(published.sizes())} files of its manifest are there, their sums are for the pods to check"
        )

    try:
        return _within(timeout_s, look)
    except StoreError as error:
        return f"not checked here: {error}"
    except (VersionError, ManifestError) as error:
        if isinstance(error.__cause__, PermissionError):
            return f"not checked here: {error}"
        raise CheckError(str(error)) from error


def check_source_goldens(
    source: str, client: "Client", *, version: int, model: str, timeout_s: float
) -> None:
    """Ask for a version's golden images, as `check_goldens`, from where pods pull it; where that is not
    possible from here, or it has none, a line says so.

    timeout_s: for the images to come.
    """
    from graftserve.export.errors import ManifestError, StoreError, VersionError
    from graftserve.export.goldens import EXTRA
    from graftserve.k8s.rollout import CheckError

    def fetch() -> dict[str, bytes]:
        published = _find(source, version)
        published.sizes()
        return published.read(f"{EXTRA}/goldens")

    try:
        files = _within(timeout_s, fetch)
    except StoreError as error:
        say(f"compared without golden images: {error}")
        return
    except (VersionError, ManifestError) as error:
        raise CheckError(str(error)) from error
    with TemporaryDirectory(prefix="graftserve-goldens-") as directory:
        for name, content in files.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if not check_goldens(Path(directory), client, version=version, model=model):
            say(f"compared without golden images: version {version} has none that graftserve export wrote")


def _check_sums(folder: Path) -> str:
    from graftserve.export.manifest import check_manifest

    return f"{check_manifest(folder)} files with the sums of the manifest"


def _find(source: str, version: int) -> "Published":
    from graftserve.export.errors import NoVersionsError, StoreError
    from graftserve.export.published import find_published
    from graftserve.export.store import is_url, local_path

    if not source:
        raise StoreError("there is no MODEL_SOURCE")
    if not is_url(source):
        place = local_path(source)
        base = place.parent if place.name == str(version) else place
        try:
            is_here = place.is_absolute() and base.is_dir()  # or else a path in the pods, such as of a claim
        except OSError as error:
            raise StoreError(f"{source}: {error.strerror or error}") from error
        if not is_here:
            raise StoreError(f"{source} is not on this machine")
    try:
        return find_published(source, version)
    except NoVersionsError as error:  # the stable one came from somewhere: pods have another view, or place
        raise StoreError(f"{source} holds no version that can be seen from here") from error


def _within(timeout_s: float, call: Callable[[], T]) -> T:
    """What `call` gives, or raises; StoreError if that takes longer.

    Then its thread goes on, and ends with the process: what waits for a network cannot be told to stop.
    """
    from graftserve.export.errors import StoreError

    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, name="check", daemon=True).start()
    if wait([answer], timeout_s).not_done:
        raise StoreError(f"it took longer than {timeout_s:g} s; --timeout-s gives it more")
    return answer.result()
