"""The one command, `graftserve`."""

from .app import main

__all__ = ["main"]
