"""What an exported version promises: its signatures, and contract.json.

The modules of export/ import TensorFlow, so that they are read from their source.
"""

import ast
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from graftserve.client.wire.contract import (
    CLASSIFY,
    EXAMPLES,
    FEATURES,
    IMAGE_BYTES,
    IMAGES,
    PIXELS,
    SERVING_DEFAULT,
    SIGNATURE_OUTPUTS,
)

from .fields import Field, read_dataclass
from .markdown import code, heading, prose, table

__all__ = ["render_document", "render_signatures"]

_INPUTS: Mapping[str, tuple[str, str]] = {
    SERVING_DEFAULT: (IMAGE_BYTES, "string [N]: encoded images"),
    FEATURES: (IMAGE_BYTES, "string [N]: encoded images"),
    PIXELS: (IMAGES, "uint8 [N, side, side, 3]: RGB"),
    CLASSIFY: (EXAMPLES, "string [N]: tf.Example with `image/encoded`"),
}

_OUTPUTS: Mapping[str, str] = {
    "classes": "string [N, K]",
    "scores": "float32 [N, K], descending",
    "probabilities": "float32 [N, C], in the order of `assets/labels.txt`",
    "features": "float32 [N, D]",
    "valid": "bool [N]: whether the image could be decoded",
}

_KEYS: Mapping[str, str] = {
    "format": "number of this format; a reader refuses others",
    "created": "when, ISO 8601 in UTC",
    "graftserve": "version that exported it",
    "tensorflow": "version that exported it",
    "source": "what it was made of: a run, a Keras model or a SavedModel",
    "backbone": "its name",
    "classes": "C, the number of labels",
    "features": "D, the width of the features; null without that signature",
    "top_k": "K, the number of classes that an answer names",
    "temperature": "by which logits are divided before the softmax",
    "signatures": "the outputs of each signature, by its name",
    "preprocess": "how an image becomes pixels: see below",
    "exif_orientation": "who applies it",
    "batching": "the queue in the graph: see below; null without one",
    "engines": "what there is for other engines than TensorFlow, by name",
    "goldens": "held-out images, or made-up patterns where there were none",
    "test_accuracy": "on held-out images, 0 to 1; null if it was not measured",
    "test_top5_accuracy": "the same of the five best classes",
    "test_images": "how many they were",
    "notes": "what else to know: each a sentence",
}


def render_signatures() -> str:
    rows = [
        (
            code(name),
            f"{code(_INPUTS[name][0])} {prose(_INPUTS[name][1])}",
            "<br>".join(f"{code(output)} {prose(_OUTPUTS[output])}" for output in outputs),
        )
        for name, outputs in SIGNATURE_OUTPUTS.items()
    ]
    return table(("signature", "input", "outputs"), rows)


def render_document() -> str:
    keys = _written_keys()
    if sorted(keys) != sorted(_KEYS):
        raise LookupError(f"contract.json has the keys {sorted(keys)}, but {sorted(_KEYS)} are described")
    parts = [table(("key", "value"), [(code(key), prose(_KEYS[key])) for key in keys])]
    for title, package, module, name in (
        ("preprocess", "training", "preprocess", "Preprocess"),
        ("batching", "export", "batching", "Batching"),
    ):
        intro, fields = read_dataclass(_source(package, module), name)
        parts += [heading(3, title), prose(intro), _fields_table(fields)]
    return "\n\n".join(parts)


def _fields_table(fields: list[Field]) -> str:
    header = ("key", "default", "meaning")
    return table(header, [(code(f.name), code(f.default), prose(f.meaning)) for f in fields])


def _source(package: str, module: str) -> Path:
    spec = find_spec(f"graftserve.{package}")  # the package alone: its modules would bring TensorFlow
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"graftserve.{package} is not installed")
    return Path(spec.submodule_search_locations[0], f"{module}.py")


def _written_keys() -> list[str]:
    """The keys that `write_contract` writes, in its order."""
    tree = ast.parse(_source("export", "contract").read_text(encoding="utf-8"))
    (function,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "write_contract"
    )
    (call,) = (
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "write_json"
    )
    document = call.args[1]
    if not isinstance(document, ast.Dict):
        raise LookupError("write_contract: expected a dictionary in its call of write_json")
    return [str(key.value) for key in document.keys if isinstance(key, ast.Constant)]
