"""The messages of model_server_config.proto."""

from .descriptors import define

globals().update(define(__name__))
