"""A backbone that a test can train in a second; `register` puts it in the table as "small".

Its weights are random but always the same, so that its features can be cached and compared.
"""

import keras

from graftserve.training.backbones import BACKBONES, Backbone, PixelRange

__all__ = ["register"]

NAME, SIDE_PX, FEATURES = "small", 48, 64


def build(weights: str | None) -> keras.Model:
    """Normalised pixels to features [N, 64]: conv1, bn1, conv2, bn2, conv3."""
    image = keras.Input((SIDE_PX, SIDE_PX, 3), name="image")
    x = image
    for index, (filters, stride) in enumerate(((16, 2), (32, 2), (FEATURES, 3)), start=1):
        initial = keras.initializers.HeNormal(index)
        x = keras.layers.Conv2D(filters, 5, stride, "same", kernel_initializer=initial, name=f"conv{index}")(
            x
        )
        if index < 3:
            x = keras.layers.BatchNormalization(name=f"bn{index}")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
    return keras.Model(image, keras.layers.GlobalAveragePooling2D(name="pool")(x), name=NAME)


def register() -> None:
    """Make "small" a name that recipes may use."""
    BACKBONES[NAME] = Backbone(
        name=NAME,
        build=build,
        side_px=SIDE_PX,
        pixel_range=PixelRange((127.5,) * 3, (127.5,) * 3),
        feature_count=FEATURES,
        boundary="conv3",
        depth_layers=("relu1", "relu2", "relu3"),
        crop_fraction=1.0,
    )
