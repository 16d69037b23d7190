"""The head, on the backbone and apart again."""

import keras
import numpy as np
import pytest

from graftserve.training.errors import RunError
from graftserve.training.graft import build_head, graft, logits_of, set_linear, split_model
from graftserve.training.recipe import Head

FEATURES = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


def kinds(head: keras.Model) -> list[str]:
    return [type(layer).__name__ for layer in head.layers[1:]]


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        (Head(), ["Dense", "Softmax"]),
        (Head(dropout=0.5), ["Dropout", "Dense", "Softmax"]),
        (Head((7,), 0.5), ["Dense", "Dropout", "Dense", "Softmax"]),
        (Head((7, 8), 0.5), ["Dense", "Dropout", "Dense", "Dense", "Softmax"]),
    ],
)
def test_the_layers_of_a_head(settings: Head, layers: list[str]) -> None:
    head = build_head(6, 3, settings)
    assert kinds(head) == layers
    assert [layer.units for layer in head.layers if isinstance(layer, keras.layers.Dense)] == [
        *settings.hidden,
        3,
    ]
    probabilities = np.asarray(head(FEATURES))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    logits = np.asarray(logits_of(head)(FEATURES))
    np.testing.assert_allclose(keras.ops.softmax(logits), probabilities, rtol=1e-5)


def test_the_seed_decides_where_a_head_begins() -> None:
    kernels = [build_head(6, 3, Head((4,)), seed).get_weights()[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()


def test_a_linear_head_computes_what_its_weights_say() -> None:
    kernel, bias = np.arange(18, dtype=np.float32).reshape(6, 3) / 10, np.array([1, 2, 3], np.float32)
    head = set_linear(build_head(6, 3, Head()), kernel, bias)
    np.testing.assert_allclose(logits_of(head)(FEATURES), FEATURES @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_split_is_the_inverse_of_graft(tmp_path) -> None:
    pixels = keras.Input((4, 4, 3), dtype="uint8")
    backbone = keras.Model(
        pixels, keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1.0)(pixels)), name="b"
    )
    head = build_head(3, 2, Head())
    model = graft(backbone, head)
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    outputs = model(images)
    np.testing.assert_allclose(outputs["probabilities"], head(backbone(images)), rtol=1e-5)
    model.save(tmp_path / "model.keras")
    for whole in (model, keras.saving.load_model(tmp_path / "model.keras")):
        features, same_head = split_model(whole)
        assert features.name == "b"
        np.testing.assert_allclose(features(images), outputs["features"], rtol=1e-5)
        np.testing.assert_allclose(same_head(outputs["features"]), outputs["probabilities"], rtol=1e-5)
    with pytest.raises(RunError, match="expected the outputs features and probabilities"):
        split_model(backbone)
