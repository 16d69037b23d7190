"""The messages of inference.proto."""

from .descriptors import define

globals().update(define(__name__))
