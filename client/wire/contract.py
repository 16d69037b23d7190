"""The names that an exported model and its clients agree on: signatures, inputs, outputs."""

from typing import Final

__all__ = [
    "CLASSIFY",
    "CLASSIFY_OUTPUTS",
    "EMBED_OUTPUTS",
    "EXAMPLES",
    "FEATURES",
    "IMAGES",
    "IMAGE_BYTES",
    "INT8_TOLERANCE",
    "PIXELS",
    "SERVING_DEFAULT",
    "SIGNATURE_OUTPUTS",
]

SERVING_DEFAULT: Final = "serving_default"
FEATURES: Final = "features"
PIXELS: Final = "pixels"
CLASSIFY: Final = "classify"

IMAGE_BYTES: Final = "image_bytes"
"""Input of `serving_default` and `features`."""

IMAGES: Final = "images"
"""Input of `pixels`."""

EXAMPLES: Final = "inputs"
"""Input of `classify`: the name that TensorFlow Serving's Classify API wants."""

SIGNATURE_OUTPUTS: Final = {
    SERVING_DEFAULT: ("classes", "scores", "probabilities", "valid"),
    FEATURES: ("features", "valid"),
    PIXELS: ("classes", "scores", "probabilities"),
    CLASSIFY: ("classes", "scores"),
}
"""All that each signature can answer; an export may leave some of it out."""

CLASSIFY_OUTPUTS: Final = ("classes", "scores", "valid")
"""What a client asks `serving_default` for. Not `probabilities`: many times as large with many classes."""

EMBED_OUTPUTS: Final = ("features", "valid")
"""What a client asks `features` for."""

INT8_TOLERANCE: Final = 0.05
"""How much farther a golden image's probability may be off in int8 than where the version was exported, by
goldens.json: other CPUs have other kernels."""
