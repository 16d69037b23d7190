"""The names that an exported model and its clients agree on: signatures, inputs, outputs."""

from typing import Final

__all__ = ["CLASSIFY_OUTPUTS", "EMBED_OUTPUTS", "FEATURES", "IMAGE_BYTES", "SERVING_DEFAULT"]

SERVING_DEFAULT: Final = "serving_default"
FEATURES: Final = "features"
IMAGE_BYTES: Final = "image_bytes"

CLASSIFY_OUTPUTS: Final = ("classes", "scores", "valid")
"""What a client asks `serving_default` for. Not `probabilities`: many times as large with many classes."""

EMBED_OUTPUTS: Final = ("features", "valid")
"""What a client asks `features` for."""
