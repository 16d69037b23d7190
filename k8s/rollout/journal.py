"""The record of a model's rollouts at one place: the one under way, and those before. One JSON file.

    with Journal(path, target, model).writing(holder) as writer:   # nobody else writes meanwhile
        writer.begin(rollout)
        writer.update(rollout)
        writer.end(rollout)

The file is written aside, made durable and renamed: whoever reads it, also after a power cut, finds the state
before or after a step. A lock keeps writers apart. Where the file system has locks that do not reach other
machines, the generation, which each write counts up, still tells that somebody else has written.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BusyError, ConflictError, JournalError
from .files import LockedError, locked, replace_file
from .record import Rollout, rollout_from_json, rollout_to_json

__all__ = ["Journal", "JournalWriter", "Record"]

_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What the file holds. generation: how often it was written; 0 for never.

    settings: how the place is reached, as the first `writing` said; plain values.
    current: the rollout under way, or None. history: those that ended, oldest first.
    """

    generation: int = 0
    settings: dict[str, Any] | None = None
    current: Rollout | None = None
    history: tuple[Rollout, ...] = ()

    @property
    def next_number(self) -> int:
        """For the next rollout."""
        return self.history[-1].number + 1 if self.history else 1


class Journal:
    """The file `path` for one model at one target, which it names, so that no other's is taken for it.

    lock_path: where the lock is, if not beside the file.
    """

    def __init__(self, path: Path, target: str, model: str, *, lock_path: Path | None = None) -> None:
        self.path = path
        self._lock_path = lock_path or path.with_name(f"{path.name}.lock")
        self._target = target
        self._model = model

    def read(self) -> Record:
        """What the file holds; an empty Record if it is not there. Raises JournalError."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return Record()
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        try:
            return self._parse(json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise JournalError(
                f"{self.path}: expected the record of rollouts that graftserve writes, got something else "
                f"({type(error).__name__}: {error}); move it away to begin anew"
            ) from error

    @contextmanager
    def writing(self, holder: str, settings: dict[str, Any]) -> Iterator["JournalWriter"]:
        """Keep others from writing. holder: told to those whom this keeps out.

        Raises BusyError if somebody else is writing, JournalError.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._lock_path, wait=False, holder=holder):
                yield JournalWriter(self, self.read(), settings)
        except LockedError as error:
            raise BusyError(
                f"{self.path}: {error.holder or 'another process'} is at work on this rollout; let it "
                "finish, or end it (SIGINT, SIGTERM) and run this again"
            ) from error
        except OSError as error:
            raise JournalError(f"{error.filename or self.path}: {error.strerror or error}") from error

    def _write(self, record: Record) -> None:
        values = {
            "format": _FORMAT,
            "generation": record.generation,
            "target": self._target,
            "model": self._model,
            "settings": record.settings or {},
            "current": None if record.current is None else rollout_to_json(record.current),
            "history": [rollout_to_json(rollout) for rollout in record.history],
        }
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(self.path, f"{text}\n".encode())

    def _parse(self, values: Any) -> Record:
        if values["format"] != _FORMAT:
            raise ValueError(f"format {values['format']}, expected {_FORMAT}: written by another release")
        if (values["target"], values["model"]) != (self._target, self._model):
            raise ValueError(
                f"it is of model {values['model']} at {values['target']}, expected {self._model} at "
                f"{self._target}"
            )
        current = values["current"]
        return Record(
            int(values["generation"]),
            dict(values["settings"]),
            None if current is None else rollout_from_json(current),
            tuple(rollout_from_json(item) for item in values["history"]),
        )


class JournalWriter:
    """Changes a journal whose lock is held. Every method raises ConflictError if somebody else has written
    since, JournalError if the file cannot be written."""

    def __init__(self, journal: Journal, record: Record, settings: dict[str, Any]) -> None:
        self._journal = journal
        self._settings = settings
        self.record = record

    def begin(self, rollout: Rollout) -> None:
        """A rollout is under way."""
        self._store(rollout, self.record.history)

    def update(self, rollout: Rollout) -> None:
        """It has come further."""
        self._store(rollout, self.record.history)

    def end(self, rollout: Rollout) -> None:
        """It is over."""
        self._store(None, (*self.record.history, rollout))

    def _store(self, current: Rollout | None, history: tuple[Rollout, ...]) -> None:
        found = self._journal.read().generation
        if found != self.record.generation:
            raise ConflictError(
                f"{self._journal.path}: somebody else wrote it meanwhile (generation {found}, expected "
                f"{self.record.generation}); nothing more is done here, see `graftserve rollout status`"
            )
        record = Record(found + 1, self._settings, current, history)
        try:
            self._journal._write(record)
        except OSError as error:
            raise JournalError(
                f"{self._journal.path}: cannot be written: {error.strerror or error}; nothing more is done"
            ) from error
        self.record = record
