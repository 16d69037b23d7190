"""Servers of one version each, as a track's pods are."""

from collections.abc import Callable
from typing import Any

from graftserve.client.testing import FakeModel, FakeServer

__all__ = ["good", "permuted", "serve"]


def serve(version: int, label: Callable[[bytes], str], **settings: Any) -> FakeServer:
    """A server of model flowers that has this version and gives an image's bytes this label."""
    model = FakeModel("flowers", answer=label)
    model.versions.clear()
    model.set_version(version)
    return FakeServer(model, **settings)


def good(image: bytes) -> str:
    return ("daisy", "roses")[len(image) % 2]


def permuted(image: bytes) -> str:
    """Never what the good one says."""
    return ("roses", "daisy")[len(image) % 2]
