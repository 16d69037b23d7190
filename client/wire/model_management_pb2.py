"""The messages of model_management.proto."""

from .descriptors import define

globals().update(define(__name__))
