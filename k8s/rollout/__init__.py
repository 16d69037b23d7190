"""Bring a new version of a model into service: beside the old one, compared with it, and back if need be.

`plan` decides what to do next (pure), `drive` does it and keeps the `journal`, a `stage.Stage` is where it
is done; `server` is the stage of a model server outside Kubernetes. `gate` says whether a version is good
enough, `shadow` finds out. No TensorFlow.
"""

from .config_file import ModelConfigFile
from .drive import AlreadyStableError, CheckError, Driver, begin, begin_undo, decide, leave
from .errors import (
    BusyError,
    ConfigFileError,
    ConflictError,
    JournalError,
    RefusedError,
    RolloutError,
    StuckError,
)
from .gate import Gate, Report
from .journal import Journal, JournalWriter, Record
from .plan import Limits, conflict
from .record import Decision, Kind, Outcome, Rollout, rollout_to_json
from .server import ModelServer
from .shadow import compare
from .stage import Observed, Placement, Stage

__all__ = [
    "AlreadyStableError",
    "BusyError",
    "CheckError",
    "ConfigFileError",
    "ConflictError",
    "Decision",
    "Driver",
    "Gate",
    "Journal",
    "JournalError",
    "JournalWriter",
    "Kind",
    "Limits",
    "ModelConfigFile",
    "ModelServer",
    "Observed",
    "Outcome",
    "Placement",
    "Record",
    "RefusedError",
    "Report",
    "Rollout",
    "RolloutError",
    "Stage",
    "StuckError",
    "begin",
    "begin_undo",
    "compare",
    "conflict",
    "decide",
    "leave",
    "rollout_to_json",
]
