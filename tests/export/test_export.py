"""Export: the folder that appears, what its signatures answer, and what is refused."""

import hashlib
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from graftserve.client.wire import PredictionLog
from graftserve.client.wire.contract import CLASSIFY_OUTPUTS, EMBED_OUTPUTS, FEATURES, SERVING_DEFAULT
from graftserve.client.wire.tensors import to_array
from graftserve.export import (
    Batching,
    ExportError,
    VerificationError,
    VersionError,
    export_run,
    published_versions,
)
from graftserve.export.verify import open_signatures, verify_model
from graftserve.training import RunDirectory, RunError


@pytest.fixture(scope="module")
def goldens(trained: RunDirectory) -> tuple[list[bytes], np.ndarray]:
    images = [golden.file.read_bytes() for golden in trained.goldens]
    return images, np.array([golden.probabilities for golden in trained.goldens], np.float32)


@pytest.fixture(scope="module")
def signatures(exported):
    """The exported signatures, loaded as TensorFlow Serving loads them."""
    with open_signatures(exported.path) as loaded:
        yield loaded


def test_the_folder_holds_what_the_contract_names(exported) -> None:
    files = {
        path.relative_to(exported.path).as_posix() for path in exported.path.rglob("*") if path.is_file()
    }
    assert files >= {
        "saved_model.pb",
        "variables/variables.index",
        "assets/labels.txt",
        "assets.extra/contract.json",
        "assets.extra/manifest.sha256",
        "assets.extra/tf_serving_warmup_requests",
        "assets.extra/goldens/goldens.json",
    }
    assert (exported.path / "assets/labels.txt").read_text() == "".join(f"{n}\n" for n in range(10))
    assert exported.check.largest_difference < 1e-5
    assert exported.size_bytes < 20e6  # the network once: its weights are 13.6 MB
    assert [path.name for path in exported.path.parent.iterdir()] == ["1"]


def test_the_manifest_covers_every_file(exported) -> None:
    lines = (exported.path / "assets.extra/manifest.sha256").read_text().splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    files = {
        path.relative_to(exported.path).as_posix() for path in exported.path.rglob("*") if path.is_file()
    }
    assert set(listed) == files - {"assets.extra/manifest.sha256"}
    for name, digest in listed.items():
        assert hashlib.sha256((exported.path / name).read_bytes()).hexdigest() == digest


def test_the_contract_says_what_was_built(exported, trained: RunDirectory) -> None:
    contract = json.loads((exported.path / "assets.extra/contract.json").read_text())
    assert contract["signatures"] == [SERVING_DEFAULT, FEATURES]
    assert contract["preprocess"] == trained.preprocess.to_dict()
    assert contract["classes"] == 10
    assert contract["batching"]["sizes"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert contract["test_accuracy"] == trained.metrics["evaluation"]["test"]["accuracy"]


def test_every_tensor_has_the_batch_first(exported) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta_graph = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(exported.path))
    shapes = {
        name: {
            tensor: (info.dtype, [dim.size for dim in info.tensor_shape.dim])
            for tensor, info in [*signature.inputs.items(), *signature.outputs.items()]
        }
        for name, signature in meta_graph.signature_def.items()
        if not name.startswith("__")
    }
    string, float32, boolean = (dtype.as_datatype_enum for dtype in (tf.string, tf.float32, tf.bool))
    assert shapes == {
        SERVING_DEFAULT: {
            "image_bytes": (string, [-1]),
            "classes": (string, [-1, 5]),
            "scores": (float32, [-1, 5]),
            "probabilities": (float32, [-1, 10]),
            "valid": (boolean, [-1]),
        },
        FEATURES: {
            "image_bytes": (string, [-1]),
            "features": (float32, [-1, 1280]),
            "valid": (boolean, [-1]),
        },
    }


def test_a_broken_image_leaves_its_neighbours_exact(signatures, goldens) -> None:
    images, expected = goldens
    broken = [b"", b"text", images[0][:3], images[0][:200], images[0][:-200], b"\x89PNG\r\n\x1a\n"]
    mixed = [image for pair in zip(images[:6], broken, strict=True) for image in pair]
    results = signatures.run(SERVING_DEFAULT, mixed)
    assert results["valid"].tolist() == [True, False] * 6
    np.testing.assert_allclose(results["probabilities"][0::2], expected[:6], atol=1e-5)
    assert not results["probabilities"][1::2].any()
    assert not results["scores"][1::2].any()
    assert set(results["classes"][1::2].ravel()) == {b""}
    embedded = signatures.run(FEATURES, mixed)
    assert embedded["valid"].tolist() == [True, False] * 6
    assert embedded["features"][0::2].any(axis=1).all()
    assert not embedded["features"][1::2].any()


def test_top_classes_are_the_labels_of_the_largest_probabilities(signatures, goldens, trained) -> None:
    images, expected = goldens
    results = signatures.run(SERVING_DEFAULT, images)
    order = np.argsort(-expected, axis=1)[:, :5]
    labels = np.array([label.encode() for label in trained.labels])
    assert [[*row] for row in results["classes"]] == [[*row] for row in labels[order]]
    np.testing.assert_allclose(results["scores"], np.take_along_axis(expected, order, 1), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_any_number_of_images(signatures, goldens, count: int) -> None:
    images, expected = goldens
    rows = [index % len(images) for index in range(count)]
    results = signatures.run(SERVING_DEFAULT, [images[row] for row in rows])
    assert results["probabilities"].shape == (count, 10)
    np.testing.assert_allclose(results["probabilities"], expected[rows], atol=1e-5)


def test_only_broken_images(signatures) -> None:
    results = signatures.run(SERVING_DEFAULT, [b"x", b"y"])
    assert results["valid"].tolist() == [False, False]
    assert results["probabilities"].shape == (2, 10)


def test_concurrent_requests_each_get_their_own_rows(signatures, goldens) -> None:
    images, expected = goldens

    def ask(index: int) -> float:
        rows = [(index + offset) % len(images) for offset in range(index % 3 + 1)]
        results = signatures.run(SERVING_DEFAULT, [images[row] for row in rows])
        return float(np.abs(results["probabilities"] - expected[rows]).max())

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(64))) < 1e-5


def test_more_than_the_largest_request_is_refused(signatures, goldens) -> None:
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="Too many images in one request: expected at most 1024"
    ):
        signatures.run(SERVING_DEFAULT, [goldens[0][0]] * 1025)


def test_warmup_has_every_batch_size_of_every_signature(exported) -> None:
    path = exported.path / "assets.extra/tf_serving_warmup_requests"
    requests = [
        PredictionLog.FromString(record).predict_log.request
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    ]
    calls = [
        (
            request.model_spec.signature_name,
            tuple(request.output_filter),
            len(to_array(request.inputs["image_bytes"])),
        )
        for request in requests
    ]
    assert calls == [
        *((SERVING_DEFAULT, CLASSIFY_OUTPUTS, size) for size in range(1, 9)),
        *((FEATURES, EMBED_OUTPUTS, size) for size in range(1, 9)),
        (SERVING_DEFAULT, (), 1),
    ]
    assert len(requests) == exported.warmup_records
    assert {request.model_spec.name for request in requests} == {"digits"}


def test_versions_count_up_and_are_never_overwritten(trained, exported, tmp_path: Path) -> None:
    base = tmp_path / "digits"
    shutil.copytree(exported.path, base / "7")
    (base / "not_a_version").mkdir()
    assert published_versions(base) == [7]
    with pytest.raises(VersionError, match="7: exists; versions are never overwritten"):
        export_run(trained.path, base, version=7)
    second = export_run(trained.path, base, top_k=99)
    assert second.version == 8
    with open_signatures(second.path) as signatures:
        assert signatures.run(SERVING_DEFAULT, [b""])["scores"].shape == (1, 10)


def test_two_exports_at_once_get_two_versions(trained, exported, tmp_path: Path) -> None:
    """Renaming is where they meet: both want the next number."""
    from graftserve.export.publish import _publish

    base = tmp_path / "digits"
    base.mkdir()
    barrier = threading.Barrier(8)

    def publish(index: int) -> int:
        temporary = base / f".exporting-{index}"
        temporary.mkdir()
        (temporary / "saved_model.pb").write_bytes(b"x")
        barrier.wait()
        return int(_publish(temporary, base, None).name)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(publish, range(8))) == list(range(1, 9))


@pytest.mark.parametrize(("options", "message"), [({"version": 0}, "above 0"), ({"top_k": 0}, "top_k")])
def test_bad_options(trained, tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_run(trained.path, tmp_path / "digits", **options)
    assert not (tmp_path / "digits").exists()


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        export_run(tmp_path / "none", tmp_path / "digits")


def test_a_model_that_changed_since_training_is_refused(trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    goldens = json.loads((run / "goldens/goldens.json").read_text())
    goldens["goldens"][0]["probabilities"][0] += 0.01
    (run / "goldens/goldens.json").write_text(json.dumps(goldens))
    with pytest.raises(ExportError, match="answers differently from when it was trained"):
        export_run(run, tmp_path / "digits")
    assert not (tmp_path / "digits").exists()


def test_a_difference_is_found(exported, goldens, signatures) -> None:
    images, expected = goldens
    features = np.asarray(signatures.run(FEATURES, images)["features"], np.float32)
    assert verify_model(exported.path, images, expected, features).images == len(images)
    wrong = expected.copy()
    wrong[3, 0] += 0.01
    with pytest.raises(VerificationError, match=r"serving_default: probabilities differ by 0\.01"):
        verify_model(exported.path, images, wrong, features)
    with pytest.raises(VerificationError, match="features: features differ"):
        verify_model(exported.path, images, expected, features + 0.5)


def test_a_folder_that_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="does not load in a Session"), open_signatures(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_leaves_nothing(trained, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="cannot be written"):
        export_run(trained.path, tmp_path / "digits")


def test_a_file_in_the_way_leaves_nothing(trained, tmp_path: Path) -> None:
    (tmp_path / "digits").write_text("in the way")
    with pytest.raises(ExportError, match="digits: cannot be written: "):
        export_run(trained.path, tmp_path / "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ()}, "sizes"),
        ({"sizes": (4, 2)}, "sizes: expected ascending"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"timeout_us": -1}, "timeout_us"),
        ({"max_request_images": 4}, "max_request_images: expected at least 8"),
        ({"max_queued_batches": 5}, "max_queued_batches: expected at least 128"),
    ],
)
def test_batching_is_checked(values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(**values)
