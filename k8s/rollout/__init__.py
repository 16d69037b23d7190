"""Bring a new version of a model into service: beside the old one, compared with it, and back if need be.

`plan` decides what to do next (pure), `drive` does it and keeps the `journal`, a `stage.Stage` is where it
is done; `server` is the stage of a model server outside Kubernetes. On Kubernetes, versions are lines of
an `overlay`'s files: `overlay_plan` decides which to change, `overlay_drive` changes them, `cluster` applies
them through the Kubernetes `api`, and `ready` tells how far their pods are. `gate` says whether a version is
good enough, `shadow` finds out. No TensorFlow.
"""

from .api import FIELD_MANAGER
from .cluster import CANARY_DEPLOYMENT, STABLE_DEPLOYMENT, Cluster, TrackState
from .config_file import ModelConfigFile
from .drive import AlreadyStableError, CheckError, Driver, begin, begin_undo, decide, leave
from .errors import (
    BusyError,
    ClusterError,
    ConfigFileError,
    ConflictError,
    FieldConflictError,
    ForbiddenError,
    JournalError,
    NotReadyError,
    OverlayError,
    RefusedError,
    RolloutError,
    StuckError,
)
from .forwarding import port_forward
from .gate import Gate, Report
from .journal import Journal, JournalWriter, Record
from .overlay import Edit, Overlay, Tracks
from .overlay_drive import JOURNAL, Applied, OverlayDriver, decide_on_overlay
from .overlay_plan import Ramp, Share, changed_by_others, next_edit
from .plan import Limits, conflict
from .record import Decision, Kind, Outcome, Rollout, rollout_to_json
from .server import ModelServer
from .shadow import compare
from .stage import Observable, Observed, Placement, Stage

__all__ = [
    "CANARY_DEPLOYMENT",
    "FIELD_MANAGER",
    "JOURNAL",
    "STABLE_DEPLOYMENT",
    "AlreadyStableError",
    "Applied",
    "BusyError",
    "CheckError",
    "Cluster",
    "ClusterError",
    "ConfigFileError",
    "ConflictError",
    "Decision",
    "Driver",
    "Edit",
    "FieldConflictError",
    "ForbiddenError",
    "Gate",
    "Journal",
    "JournalError",
    "JournalWriter",
    "Kind",
    "Limits",
    "ModelConfigFile",
    "ModelServer",
    "NotReadyError",
    "Observable",
    "Observed",
    "Outcome",
    "Overlay",
    "OverlayDriver",
    "OverlayError",
    "Placement",
    "Ramp",
    "Record",
    "RefusedError",
    "Report",
    "Rollout",
    "RolloutError",
    "Share",
    "Stage",
    "StuckError",
    "TrackState",
    "Tracks",
    "begin",
    "begin_undo",
    "changed_by_others",
    "compare",
    "conflict",
    "decide",
    "decide_on_overlay",
    "leave",
    "next_edit",
    "port_forward",
    "rollout_to_json",
]
