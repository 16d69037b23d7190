"""The model card: README.md in a version's folder, for whoever finds it there in a year.

Sections after Mitchell et al. 2019, "Model Cards for Model Reporting".
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftserve.client.wire.contract import (
    CLASSIFY,
    EXAMPLES,
    FEATURES,
    IMAGE_BYTES,
    IMAGES,
    PIXELS,
    SERVING_DEFAULT,
)
from graftserve.training.evaluate import Evaluation
from graftserve.training.files import write_atomically

from .contract import Contract, read_contract
from .source import Source
from .tune import Tuning
from .verify import Check

__all__ = ["write_card"]

_INPUTS = {
    SERVING_DEFAULT: f"`{IMAGE_BYTES}`: string [N], JPEG, PNG, GIF, BMP or WebP files",
    FEATURES: f"`{IMAGE_BYTES}`: string [N], the same",
    PIXELS: f"`{IMAGES}`: uint8 [N, {{side}}, {{side}}, 3], RGB",
    CLASSIFY: f"`{EXAMPLES}`: string [N], tf.Example with `image/encoded`",
}
_LABELS_SHOWN = 100
_CLASSES_SHOWN = 10


def write_card(folder: Path, model_name: str, source: Source, check: Check, tuning: Tuning | None) -> None:
    """Write README.md into the version's folder, from its contract, its source and what was measured."""
    contract = read_contract(folder)
    sections = (
        _what(model_name, source),
        _data(source),
        _quality(source),
        _call(model_name, contract),
        _limits(contract, source),
        _making(contract, source, check, tuning),
    )
    with write_atomically(folder / "README.md") as file:
        file.write("\n\n".join("\n".join(section) for section in sections) + "\n")


def _what(model_name: str, source: Source) -> Iterator[str]:
    yield f"# {model_name}"
    yield ""
    made = {
        "run": f"A new head on {source.name}, trained with graftserve.",
        "keras": f"The Keras model {source.name}, brought along.",
        "saved_model": f"The SavedModel {source.name}, brought along.",
    }
    yield f"Classifies images into {len(source.labels)} classes. {made[source.kind]}"
    yield ""
    shown = ", ".join(f"`{label}`" for label in source.labels[:_LABELS_SHOWN])
    more = len(source.labels) - _LABELS_SHOWN
    yield f"Classes: {shown}{f' and {more} more' if more > 0 else ''} (`assets/labels.txt`)."


def _data(source: Source) -> Iterator[str]:
    yield "## Data"
    yield ""
    if source.run is None:
        yield "Not known here: the model was trained elsewhere."
        return
    counts = source.run.metrics["images"]
    recipe = source.run.recipe.to_dict()
    yield f"Trained on `{Path(recipe['data_dir']).name}`."
    if counts:
        splits: dict[str, int] = {}
        for by_split in counts.values():
            for split, images in by_split.items():
                splits[split] = splits.get(split, 0) + images
        yield "Images: " + ", ".join(f"{images} {split}" for split, images in splits.items()) + "."
    yield ""
    yield "The recipe:"
    yield ""
    yield "```json"
    settings = {key: value for key, value in recipe.items() if key != "data_dir"}
    yield json.dumps(settings, indent=2, ensure_ascii=False)
    yield "```"


def _quality(source: Source) -> Iterator[str]:
    yield "## How good it is"
    yield ""
    evaluation = source.run.evaluation("test") or source.run.evaluation("validation") if source.run else None
    if source.run is None or evaluation is None:
        yield "Not known here: nothing was held out to judge it by. Judge it before you rely on it."
        return
    split = "test" if source.run.evaluation("test") else "validation"
    low, high = evaluation.accuracy_interval
    yield f"On {evaluation.images} {split} images, which it has not learnt from:"
    yield ""
    yield "| measure | value |"
    yield "|---|---|"
    yield f"| accuracy | {evaluation.accuracy:.4f} (95% interval {low:.4f} to {high:.4f}) |"
    yield f"| top-5 accuracy | {evaluation.top5_accuracy:.4f} |"
    yield f"| macro F1 | {evaluation.macro_f1:.4f} |"
    yield f"| log-loss | {evaluation.log_loss:.4f} before calibration |"
    if source.temperature != 1:
        yield f"| temperature | {source.temperature:.3f}, applied to the scores |"
    yield ""
    yield from _weakest(evaluation, source.labels)


def _weakest(evaluation: Evaluation, labels: tuple[str, ...]) -> Iterator[str]:
    yield "Weakest classes:"
    yield ""
    yield "| class | images | precision | recall |"
    yield "|---|---|---|---|"
    for index in evaluation.worst_classes(_CLASSES_SHOWN):
        scores = evaluation.classes[index]
        precision, recall = (
            "–" if share is None else f"{share:.3f}" for share in (scores.precision, scores.recall)
        )
        yield f"| {_cell(labels[index])} | {scores.images} | {precision} | {recall} |"


def _call(model_name: str, contract: Contract) -> Iterator[str]:
    yield "## How to call it"
    yield ""
    if SERVING_DEFAULT in contract.signatures:
        yield "```python"
        yield "from graftserve.client import Client"
        yield ""
        yield f'with Client("localhost:8500", model="{model_name}") as client:'
        yield '    print(client.classify("photo.jpg"))'
        yield "```"
        yield ""
    yield "| signature | input | outputs |"
    yield "|---|---|---|"
    for name, outputs in contract.signatures.items():
        source = _INPUTS[name].format(side=contract.preprocess.side_px)
        yield f"| `{name}` | {source} | {', '.join(f'`{output}`' for output in outputs)} |"
    yield ""
    yield (
        "Send files as they are: decoding, the EXIF orientation, resizing and normalisation are in the "
        "model. Where there is `valid`, it is false for an image that cannot be read; others are unaffected."
    )


def _limits(contract: Contract, source: Source) -> Iterator[str]:
    preprocess = contract.preprocess
    yield "## Limits"
    yield ""
    yield (
        "- It names one of its classes for every image, also for one that shows none of them. A low score "
        "is the only hint."
    )
    yield f"- It sees {preprocess.side_px} x {preprocess.side_px} pixels: smaller details are lost."
    if preprocess.resize == "crop":
        yield f"- It looks at the middle square, {preprocess.crop_fraction:.1%} of the shorter side."
    else:
        yield "- It squashes the image to a square, whatever its aspect."
    yield f"- Images of more than {preprocess.max_pixels / 1e6:g} megapixels are refused."
    if contract.batching:
        yield f"- One request may bring {contract.batching.max_request_images} images."
    if not source.are_goldens_real:
        yield "- Its golden images are made-up patterns: they tell whether it computes the same, no more."
    for note in source.notes:
        yield f"- {note[0].upper()}{note[1:].rstrip('.')}."


def _making(contract: Contract, source: Source, check: Check, tuning: Tuning | None) -> Iterator[str]:
    document: Mapping[str, Any] = contract.document
    yield "## How it was made"
    yield ""
    yield f"- graftserve {document['graftserve']}, TensorFlow {document['tensorflow']}, {document['created']}"
    yield (
        f"- checked on {check.images} golden images in a Session: largest difference of a probability "
        f"{check.largest_difference:.1e}"
    )
    if check.lite_difference is not None:
        yield f"- `assets.extra/network.tflite`, for LiteRT: largest difference {check.lite_difference:.1e}"
    if check.latency_ms is not None:
        yield f"- one image by itself took {check.latency_ms:.1f} ms (95th percentile) where it was made"
    if contract.batching:
        sizes = contract.batching.sizes
        chosen = "chosen by measuring" if tuning else "the default"
        yield (
            f"- batches of up to {sizes[-1]} images on {contract.batching.threads} threads, {chosen}; a "
            "server needs no `--enable_batching`"
        )
    else:
        yield "- without batching: a server with many callers needs `--enable_batching`"
    yield "- `sha256sum -c assets.extra/manifest.sha256` or `graftserve verify` here checks every file"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
