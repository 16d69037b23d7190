"""A network that is exported in a moment."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny(photos: dict[str, Any], encode: Any) -> Any:
    """A Source of three classes: the mean of each colour at 32 pixels a side, photographs as goldens."""
    import tensorflow as tf

    from graftserve.export.goldens import GoldenImage
    from graftserve.export.network import freeze_network
    from graftserve.export.source import Source
    from graftserve.training.preprocess import Preprocess, decode_images

    def call(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        features = tf.reduce_mean(tf.cast(pixels, tf.float32) / 255, axis=[1, 2])
        return {"features": features, "probabilities": tf.nn.softmax(8 * features)}

    preprocess = Preprocess(32)
    network = freeze_network(call, 32)
    images = [encode(photo) for photo in photos.values()]
    probabilities = network.run(decode_images(images, preprocess).numpy())["probabilities"]
    goldens = tuple(
        GoldenImage(f"{name}.jpg", image, None, tuple(row))
        for name, image, row in zip(photos, images, probabilities.tolist(), strict=True)
    )
    return Source("keras", "tiny", network, ("red", "green", "blue"), preprocess, goldens)


@pytest.fixture(scope="session")
def tiny_version(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tiny` as version 1 of the model "tiny"."""
    from graftserve.export import ExportOptions, export_model

    return export_model(tiny, tmp_path_factory.mktemp("models") / "tiny", ExportOptions())
