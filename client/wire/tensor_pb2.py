"""The messages of tensor.proto."""

from .descriptors import define

globals().update(define(__name__))
