"""Changing the batching of a written model: the attributes change, the answers do not."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from graftserve.client.wire.contract import PIXELS
from graftserve.export import Batching, ExportOptions, VerificationError, export_model, verify_version
from graftserve.export.contract import read_contract
from graftserve.export.publish import republish
from graftserve.export.rebatch import read_batching, write_batching
from graftserve.export.verify import open_signatures

OTHER = Batching(threads=1, sizes=(1, 4, 32), timeout_us=2000, max_request_images=64, max_queued_batches=99)


@pytest.fixture(scope="module")
def version(tiny, tmp_path_factory) -> Path:
    """A version without decoding, which is exported and loaded in a moment."""
    options = ExportOptions(signature_outputs={PIXELS: ()})
    return export_model(tiny, tmp_path_factory.mktemp("models") / "tiny", options).path


@pytest.fixture
def copied(version: Path, tmp_path: Path) -> Path:
    return shutil.copytree(version, tmp_path / "tiny" / "1")


def test_what_is_written_is_read(copied: Path) -> None:
    assert read_batching(copied) == Batching()
    write_batching(copied, OTHER)
    assert read_batching(copied) == OTHER
    assert read_contract(copied).batching == OTHER


def test_answers_stay_the_same_and_the_new_limits_hold(copied: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)
    with open_signatures(copied) as signatures:
        before = signatures.run(PIXELS, pixels[:50])["probabilities"]
    write_batching(copied, OTHER)
    with open_signatures(copied) as signatures:
        np.testing.assert_allclose(signatures.run(PIXELS, pixels[:50])["probabilities"], before, atol=1e-6)


def test_a_model_without_batching_is_refused(tmp_path: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.call = tf.function(lambda x: {"y": x}, input_signature=[tf.TensorSpec([None], tf.float32)])
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.call})
    assert read_batching(tmp_path) is None
    with pytest.raises(VerificationError, match="its network is not batched in the graph"):
        write_batching(tmp_path, OTHER)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="no SavedModel"):
        read_batching(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff" * 10)
    with pytest.raises(VerificationError, match="no SavedModel"):
        read_batching(tmp_path)


def test_a_published_version_stays_and_the_next_has_the_new_batching(copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    published = republish(copied, OTHER)
    assert published.name == "2"
    assert read_batching(published) == OTHER
    assert verify_version(published).warmup_records == 1
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in copied.parent.iterdir()) == ["1", "2"]
