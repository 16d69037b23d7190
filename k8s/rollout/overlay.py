"""A Kustomize overlay's stable.env and canary.env: which version is on which track, and how much it gets."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .env_file import edited, parse_env
from .errors import OverlayError
from .files import replace_file
from .stage import Observed

__all__ = ["CANARY_ENV", "STABLE_ENV", "Edit", "Overlay", "Tracks"]

STABLE_ENV, CANARY_ENV = "stable.env", "canary.env"
_KUSTOMIZATION = "kustomization.yaml"
# Components that have the pods of the tracks to themselves.
_OTHERS: Final = {
    "progressive": "Argo Rollouts moves the weights by itself",
    "kserve": "KServe has no canary track here",
}


@dataclass(frozen=True)
class Tracks:
    """What the two files say.

    stable, canary: versions; canary is None while there is no canary.
    replicas: the canary's pods. stable_weight, weight: of stable and canary in the route, each 0 or more; a
        track's share of the calls is its weight by the sum of both.
    """

    stable: int
    canary: int | None = None
    replicas: int = 0
    stable_weight: int = 100
    weight: int = 0

    @property
    def percent(self) -> float:
        """The canary's share of the route's calls, in [0, 100]."""
        whole = self.weight + self.stable_weight
        return 100 * self.weight / whole if whole else 0.0


@dataclass(frozen=True)
class Edit:
    """One file's new values. Each is made by one rename: done, or not done."""

    file: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.file}: {', '.join(f'{key}={value}' for key, value in self.values.items())}"


class Overlay:
    """The overlay in `folder`. Nothing is kept in memory: each call reads the files.

    Every method raises OverlayError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self) -> str:
        """The model's name."""
        name = self._values(STABLE_ENV).get("MODEL_NAME", "")
        if not name:
            raise OverlayError(f"{self.folder / STABLE_ENV}: expected MODEL_NAME=NAME, got none")
        return name

    def source(self) -> str:
        """Where its pods pull the versions from; "" if stable.env does not say."""
        return self._values(STABLE_ENV).get("MODEL_SOURCE", "")

    def read(self) -> Tracks:
        """What the files say."""
        stable, canary = self._values(STABLE_ENV), self._values(CANARY_ENV)
        version = _number(stable, "MODEL_VERSION", self.folder / STABLE_ENV)
        path = self.folder / CANARY_ENV
        return Tracks(
            version,
            None if canary.get("MODEL_VERSION") == "" else _number(canary, "MODEL_VERSION", path),
            _number(canary, "REPLICAS", path),
            _number(canary, "STABLE_WEIGHT", path),
            _number(canary, "WEIGHT", path),
        )

    def observe(self) -> Observed:
        """The versions on the tracks, for `begin` and `begin_undo`."""
        tracks = self.read()
        return Observed(stable=tracks.stable, canary=tracks.canary)

    def check_components(self) -> None:
        """See that the pods of the tracks are those that the files speak of."""
        lines = self._read(_KUSTOMIZATION).splitlines()
        for name, reason in _OTHERS.items():
            if any(re.match(rf"\s*-\s+\S*components/{name}/?\s*(#.*)?$", line) for line in lines):
                raise OverlayError(
                    f"{self.folder}: component {name} is in it, and {reason}: change MODEL_VERSION in "
                    f"{STABLE_ENV} instead, and take that change back to undo it"
                )

    def has_route(self) -> bool:
        """Whether the overlay itself lists the component that weights are for; a base of its may, too."""
        return "components/gateway" in self._read(_KUSTOMIZATION)

    def write(self, edit: Edit) -> None:
        """Change one file."""
        path = self.folder / edit.file
        text = edited(self._read(edit.file), edit.values, str(path))
        try:
            replace_file(path, text.encode())
        except OSError as error:
            raise OverlayError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _values(self, file: str) -> dict[str, str]:
        return parse_env(self._read(file), str(self.folder / file))

    def _read(self, file: str) -> str:
        try:
            return (self.folder / file).read_bytes().decode()  # as it is, ends of lines included
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OverlayError(
                f"{self.folder / file}: cannot be read: {reason}; expected an overlay's folder, as "
                "`graftserve k8s render --output` makes it"
            ) from error


def _number(values: Mapping[str, str], key: str, path: Path) -> int:
    value = values.get(key)
    if value is None or not re.fullmatch("[0-9]+", value):
        got = "no such line" if value is None else repr(value)
        raise OverlayError(f"{path}: expected {key}= and a whole number, got {got}")
    return int(value)
