"""The messages of prediction.proto."""

from .descriptors import define

globals().update(define(__name__))
