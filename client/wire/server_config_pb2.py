"""The messages of server_config.proto."""

from .descriptors import define

globals().update(define(__name__))
