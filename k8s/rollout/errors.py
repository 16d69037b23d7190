"""What can go wrong in a rollout, beside the server's own answers (`graftserve.client.ClientError`).

RolloutError
├── ConflictError    somebody else changed what this rollout changes: nothing is overwritten
│   └── FieldConflictError  a field that would change in the cluster belongs to another manager
├── BusyError        another process is at work on it: wait, or end that one
├── RefusedError     the server refuses a configuration; its own is as it was
├── ConfigFileError  the server's --model_config_file cannot be read, edited or written
├── OverlayError     an overlay's files cannot be read or written, or do not say what they must
├── ClusterError     the Kubernetes API does not answer, or refuses, in its own words
│   ├── ForbiddenError  whoever asks has not the right to
│   └── NotReadyError  a Deployment's pods are not ready in time
├── JournalError     the record cannot be read or written, or holds no such rollout
└── StuckError       no way on and none back; the record stays open, so that running again goes on
"""

__all__ = [
    "BusyError",
    "ClusterError",
    "ConfigFileError",
    "ConflictError",
    "FieldConflictError",
    "ForbiddenError",
    "JournalError",
    "NotReadyError",
    "OverlayError",
    "RefusedError",
    "RolloutError",
    "StuckError",
]


class RolloutError(Exception):
    """A failure whose message says what was expected, what was found and what to do."""


class ConflictError(RolloutError):
    """The server, the cluster or its configuration was changed by somebody else."""


class FieldConflictError(ConflictError):
    """Another field manager owns what would change. managers: the names of those."""

    def __init__(self, message: str, managers: frozenset[str]) -> None:
        super().__init__(message)
        self.managers = managers


class BusyError(RolloutError):
    """Another process holds the lock."""


class RefusedError(RolloutError):
    """The server refused a configuration, and kept its own."""


class ConfigFileError(RolloutError):
    """The server's --model_config_file cannot be used."""


class OverlayError(RolloutError):
    """An overlay's stable.env, canary.env or kustomization.yaml cannot be used."""


class ClusterError(RolloutError):
    """The cluster cannot be reached, or refuses; part of it may be done, and asking again does the rest."""


class ForbiddenError(ClusterError):
    """Whoever asks has not the right to, by the API server's word."""


class NotReadyError(ClusterError):
    """The pods of a Deployment are not ready in time. deployment: its name."""

    def __init__(self, message: str, deployment: str) -> None:
        super().__init__(message)
        self.deployment = deployment


class JournalError(RolloutError):
    """The record of rollouts cannot be used, or does not hold what was asked for."""


class StuckError(RolloutError):
    """The goal cannot be reached, and neither can the state before."""
