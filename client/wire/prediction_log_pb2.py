"""The messages of prediction_log.proto."""

from .descriptors import define

globals().update(define(__name__))
