"""What the tests of rollouts on a cluster share, beside their fixtures."""

from collections.abc import Callable
from pathlib import Path

from graftserve.k8s.rollout import Cluster, Tracks
from tests.k8s.fake_api import Request

__all__ = ["BAD", "START", "Rollout", "is_apply", "tracks"]

START = ("start", "--version", "4", "--skip-comparison")
BAD = ("start", "--version", "9", "--skip-comparison", "--load-timeout-s", "1")

Rollout = Callable[..., tuple[int, str, str]]


def tracks(overlay: Path) -> Tracks | None:
    """What the cluster has now."""
    with Cluster(overlay) as cluster:
        return cluster.observe()


def is_apply(request: Request) -> bool:
    """Whether it is for good, no trial."""
    return request.is_apply and not request.is_dry_run
