"""What training reads, in which order, and that it is read once."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from graftserve.training.images import FolderImages
from graftserve.training.inputs import FeatureInputs, Order, PixelInputs
from graftserve.training.preprocess import Preprocess, decode_images

PREPROCESS = Preprocess(32)


class CountingImages(FolderImages):
    reads = 0

    def read(self, path: str) -> bytes:
        self.reads += 1
        return super().read(path)


@pytest.fixture
def images(tmp_path: Path, photos, encode) -> tuple[CountingImages, list[str]]:
    names = []
    for index in range(6):
        names.append(f"{index}.jpg")
        (tmp_path / names[-1]).write_bytes(encode(np.roll(photos["chelsea"], 40 * index, axis=1)))
    return CountingImages(tmp_path), names


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(7, 1, 2)
    rows = order.rows(np.arange(21)).reshape(3, 7)
    assert [sorted(epoch) for epoch in rows.tolist()] == [list(range(7))] * 3
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


def test_the_order_follows_from_seed_and_position_alone() -> None:
    whole = Order(7, 1, 2).rows(np.arange(40))
    pieces = Order(7, 1, 2)
    np.testing.assert_array_equal(pieces.rows(np.arange(25, 40).reshape(3, 5)).ravel(), whole[25:])
    np.testing.assert_array_equal(pieces.rows(np.arange(5)), whole[:5])
    assert (Order(7, 1, 3).rows(np.arange(40)) != whole).any()


@pytest.mark.parametrize("memory_bytes", [1 << 20, 100])
def test_pixels_are_the_decoded_images(images, memory_bytes: int) -> None:
    store, names = images
    expected = decode_images([store.read(name) for name in names], PREPROCESS).numpy()
    inputs = PixelInputs(store, names, PREPROCESS, memory_bytes)
    rows = np.array([[3, 0], [5, 3]])
    np.testing.assert_array_equal(inputs.gather(rows), expected[rows])
    batches = [np.array([1, 2]), np.array([4]), np.array([0, 0, 5]), np.array([1]), np.array([2])]
    for batch, found in zip(batches, inputs.ahead(batches), strict=True):
        np.testing.assert_array_equal(found, expected[batch])


def test_pixels_that_fit_in_memory_are_decoded_once(images) -> None:
    store, names = images
    once, always = PixelInputs(store, names, PREPROCESS), PixelInputs(store, names, PREPROCESS, 100)
    for _ in range(3):
        once.gather(np.arange(6))
    assert store.reads == 6
    for _ in range(2):
        always.gather(np.arange(6))
    assert store.reads == 18


def test_a_reader_that_stops_early_leaves_nothing_running(images) -> None:
    store, names = images
    inputs = PixelInputs(store, names, PREPROCESS, 100)
    reader = inputs.ahead(np.array([row % 6]) for row in range(1000))
    next(reader)
    reader.close()
    assert store.reads < 20


def test_an_unreadable_image_is_an_error(images, tmp_path: Path) -> None:
    store, names = images
    (tmp_path / names[2]).unlink()
    with pytest.raises(FileNotFoundError):
        list(PixelInputs(store, names, PREPROCESS).ahead([np.array([1]), np.array([2])]))


def test_features_are_looked_up_in_the_graph() -> None:
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    inputs = FeatureInputs(table)
    behind = inputs.after(4)
    rows = np.array([[1, 0]])
    for each, first in ((inputs, 0), (behind, 4)):
        (handed,) = each.ahead([rows])
        assert handed.dtype == np.int64
        np.testing.assert_array_equal(tf.function(inputs.lookup)(handed), table[rows + first])
