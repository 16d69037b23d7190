"""Export: the folder that appears, what its signatures answer, and what is refused."""

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from graftserve.client.wire import PredictionLog
from graftserve.client.wire.contract import (
    CLASSIFY,
    CLASSIFY_OUTPUTS,
    EMBED_OUTPUTS,
    FEATURES,
    PIXELS,
    SERVING_DEFAULT,
    SIGNATURE_OUTPUTS,
)
from graftserve.client.wire.tensors import to_array
from graftserve.export import (
    ExportError,
    ExportOptions,
    GateError,
    ManifestError,
    SourceError,
    StoreError,
    VerificationError,
    VersionError,
    export_model,
    export_run,
    published_versions,
    verify_version,
)
from graftserve.export.contract import example_of, read_contract
from graftserve.export.manifest import write_manifest
from graftserve.export.run_source import open_run
from graftserve.export.store import open_store
from graftserve.export.verify import lint, open_signatures, verify_model
from graftserve.training import RunDirectory, RunError
from graftserve.training.calibration import apply_temperature
from graftserve.training.preprocess import decode_images


@pytest.fixture(scope="module")
def goldens(trained: RunDirectory) -> tuple[list[bytes], np.ndarray]:
    images = [golden.file.read_bytes() for golden in trained.goldens]
    return images, np.array([golden.probabilities for golden in trained.goldens], np.float32)


QUICK = {"signature_outputs": {PIXELS: ()}}
"""What decodes nothing is exported in a second."""


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
        "assets.extra/network.tflite",
        "README.md",
    }
    assert (exported.path / "assets/labels.txt").read_text() == "".join(f"{n}\n" for n in range(10))
    assert exported.check.largest_difference < 1e-5
    (weights_file,) = (exported.path / "variables").glob("*.data*")
    weights = weights_file.stat().st_size
    assert 13e6 < weights < 14e6  # the network once, and not in the graph as well
    assert (exported.path / "saved_model.pb").stat().st_size < 1e6
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
    assert contract["signatures"] == {name: list(outputs) for name, outputs in SIGNATURE_OUTPUTS.items()}
    assert contract["preprocess"] == trained.preprocess.to_dict()
    assert contract["classes"] == 10
    assert contract["batching"]["sizes"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert contract["test_accuracy"] == trained.metrics["evaluation"]["test"]["accuracy"]
    assert contract["engines"]["litert"]["file"] == "network.tflite"
    assert contract["goldens"] == "held-out images"


def test_the_card_says_what_it_is(exported, trained: RunDirectory) -> None:
    card = (exported.path / "README.md").read_text()
    accuracy = trained.metrics["evaluation"]["test"]["accuracy"]
    for said in (
        "# digits",
        f"| accuracy | {accuracy:.4f}",
        "`image_bytes`",
        "## Limits",
        "efficientnet-lite0",
    ):
        assert said in card


def shapes_of(folder: Path) -> dict:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta_graph = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(folder))
    return {
        name: {
            tensor: (tf.as_dtype(info.dtype).name, [dim.size for dim in info.tensor_shape.dim])
            for tensor, info in [*signature.inputs.items(), *signature.outputs.items()]
        }
        for name, signature in meta_graph.signature_def.items()
        if not name.startswith("__")
    }


def test_every_tensor_has_the_batch_first(exported) -> None:
    answers = {"classes": ("string", [-1, 5]), "scores": ("float32", [-1, 5])}
    probabilities = {"probabilities": ("float32", [-1, 10])}
    assert shapes_of(exported.path) == {
        SERVING_DEFAULT: {
            "image_bytes": ("string", [-1]),
            **answers,
            **probabilities,
            "valid": ("bool", [-1]),
        },
        FEATURES: {
            "image_bytes": ("string", [-1]),
            "features": ("float32", [-1, 1280]),
            "valid": ("bool", [-1]),
        },
        PIXELS: {"images": ("uint8", [-1, 224, 224, 3]), **answers, **probabilities},
        CLASSIFY: {"inputs": ("string", [-1]), **answers},
    }


def test_the_classify_signature_has_the_method_that_servers_look_for(exported) -> None:
    with open_signatures(exported.path) as signatures:
        definitions = signatures.meta_graph.signature_def
        assert definitions[CLASSIFY].method_name == "tensorflow/serving/classify"
        assert definitions[SERVING_DEFAULT].method_name == "tensorflow/serving/predict"


def test_all_signatures_agree_on_the_same_images(signatures, goldens, trained) -> None:
    images, expected = goldens
    pixels = decode_images(images, trained.preprocess).numpy()
    by_pixels = signatures.run(PIXELS, pixels)
    by_bytes = signatures.run(SERVING_DEFAULT, images)
    by_example = signatures.run(CLASSIFY, [example_of(image) for image in images])
    np.testing.assert_allclose(by_pixels["probabilities"], expected, atol=1e-5)
    for name in ("classes", "scores"):
        kind = np.testing.assert_array_equal if name == "classes" else np.testing.assert_allclose
        kind(by_pixels[name], by_bytes[name])
        kind(by_example[name], by_bytes[name])


def test_an_example_without_an_image_leaves_its_neighbours_alone(signatures, goldens) -> None:
    image = example_of(goldens[0][0])
    empty = tf.train.Example().SerializeToString()
    answers = signatures.run(CLASSIFY, [image, b"no Example", empty, image])
    # Not to the last bit: kernels may treat the rows at the end of a batch differently.
    np.testing.assert_allclose(answers["scores"][0], answers["scores"][3], rtol=1e-4, atol=1e-7)
    assert answers["scores"][0].any()
    assert not answers["scores"][1:3].any()
    assert set(answers["classes"][1:3].ravel()) == {b""}


@pytest.mark.slow
def test_signatures_and_outputs_can_be_chosen(trained, tmp_path: Path) -> None:
    chosen = {SERVING_DEFAULT: ("scores", "classes"), PIXELS: ()}
    version = export_run(
        trained.path, tmp_path / "digits", signature_outputs=chosen, batching=None, version=7
    )
    shapes = shapes_of(version.path)
    assert {name: set(tensors) for name, tensors in shapes.items()} == {
        SERVING_DEFAULT: {"image_bytes", "classes", "scores"},
        PIXELS: {"images", "classes", "scores", "probabilities"},
    }
    assert b"BatchFunction" not in (version.path / "saved_model.pb").read_bytes()
    assert read_contract(version.path).batching is None
    assert verify_version(version.path).signatures == (SERVING_DEFAULT, PIXELS)
    assert version.version == 7


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"other": ()}, "signature other: expected one of serving_default, features, pixels, classify"),
        ({FEATURES: ("scores",)}, "features: scores: expected some of features, valid"),
        ({}, "expected at least one signature"),
    ],
)
def test_signatures_that_there_are_none_of(tiny, tmp_path: Path, chosen, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(tiny, tmp_path / "tiny", ExportOptions(signature_outputs=chosen))


@pytest.mark.parametrize(
    ("shape", "fault"),
    [([], "is a scalar"), ([8], "has a first axis of 8"), (None, "has no known rank")],
)
def test_the_lint_wants_the_batch_first(tmp_path: Path, shape, fault: str) -> None:
    module = tf.Module()
    spec = tf.TensorSpec(shape, tf.float32, name="x")
    module.call = tf.function(lambda x: {"y": x * 2.0}, input_signature=[spec])
    tf.saved_model.save(module, str(tmp_path), signatures={SERVING_DEFAULT: module.call})
    with open_signatures(tmp_path) as signatures, pytest.raises(VerificationError, match=fault):
        lint(signatures.meta_graph)


def test_the_temperature_is_in_the_scores(trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"temperature": 2.5}))
    source = open_run(run)
    recorded = np.array([golden.probabilities for golden in trained.goldens], np.float32)
    pixels = decode_images([golden.content for golden in source.goldens], trained.preprocess).numpy()
    np.testing.assert_allclose(
        source.network.run(pixels)["probabilities"], apply_temperature(recorded, 2.5), atol=1e-5
    )
    version = export_run(run, tmp_path / "digits", **QUICK)
    assert version.check.largest_difference < 1e-5
    assert version.check.lite_difference < 1e-4
    assert read_contract(version.path).document["temperature"] == 2.5


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
            *(len(to_array(tensor)) for tensor in request.inputs.values()),
        )
        for request in requests
    ]
    assert calls == [
        *((SERVING_DEFAULT, CLASSIFY_OUTPUTS, size) for size in range(1, 9)),
        (SERVING_DEFAULT, (), 1),
        *((FEATURES, (), size) for size in range(1, 9)),
        (PIXELS, (), 1),
        *((CLASSIFY, (), size) for size in range(1, 9)),
    ]
    assert set(EMBED_OUTPUTS) == set(SIGNATURE_OUTPUTS[FEATURES])
    assert len(requests) == exported.check.warmup_records
    assert {request.model_spec.name for request in requests} == {"digits"}


def test_versions_count_up_and_are_never_overwritten(tiny, exported, tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    shutil.copytree(exported.path, base / "7")
    (base / "not_a_version").mkdir()
    assert published_versions(base) == [7]
    with pytest.raises(VersionError, match="version 7 of tiny exists; versions are never overwritten"):
        export_model(tiny, base, ExportOptions(version=7))
    second = export_model(tiny, base, ExportOptions(top_k=99, **QUICK))
    assert second.version == 8
    with open_signatures(second.path) as signatures:
        pixels = np.zeros((2, 32, 32, 3), np.uint8)
        assert signatures.run(PIXELS, pixels)["scores"].shape == (2, 3)


def test_a_timestamp_as_version(tiny, tmp_path: Path) -> None:
    before = int(time.time())
    options = ExportOptions(version="timestamp", **QUICK)
    assert before <= export_model(tiny, tmp_path / "tiny", options).version <= time.time()


def test_into_an_object_store(tiny) -> None:
    options = ExportOptions(keep=1, **QUICK)
    urls = [export_model(tiny, "memory://bucket/tiny", options).location for _ in range(2)]
    assert urls == ["memory://bucket/tiny/1", "memory://bucket/tiny/2"]
    assert open_store("memory://bucket/tiny").versions() == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 0}, "expected next, timestamp or a number from 1"),
        ({"version": "latest"}, "expected next, timestamp or a number from 1"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"keep": 0}, "keep: expected at least 1"),
        ({"require_accuracy": 95}, "require_accuracy: expected a share from 0 to 1, got 95"),
        ({"max_latency_ms": 0}, "max_latency_ms: expected a number above 0"),
        ({"tune": True, "batching": None}, "no batching to tune"),
    ],
)
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


def rewrite_goldens(folder: Path, change) -> None:
    path = folder / "assets.extra/goldens/goldens.json"
    document = json.loads(path.read_text())
    change(document["goldens"])
    path.write_text(json.dumps(document))


@pytest.fixture
def copied(exported, tmp_path: Path) -> Path:
    """A version of one's own to damage."""
    return shutil.copytree(exported.path, tmp_path / "digits" / "1")


def test_a_difference_is_found(copied: Path, exported, goldens, signatures) -> None:
    features = np.asarray(signatures.run(FEATURES, goldens[0])["features"], np.float32)
    assert verify_model(copied, features).images == len(goldens[0])
    with pytest.raises(VerificationError, match="features: features differ"):
        verify_model(copied, features + 0.5)

    (copied / "assets.extra/network.tflite").unlink()  # which would be found to differ first

    def spoil(rows) -> None:
        rows[3]["probabilities"][0] += 0.01

    rewrite_goldens(copied, spoil)
    with pytest.raises(VerificationError, match=r"serving_default: probabilities differ by 0\.01"):
        verify_model(copied)


def test_a_version_verifies_by_itself(exported) -> None:
    check = verify_version(exported.path)
    assert check.files == len([path for path in exported.path.rglob("*") if path.is_file()]) - 1
    assert check.signatures == tuple(SIGNATURE_OUTPUTS)
    assert check.lite_difference < 1e-4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "variables/variables.index").write_bytes(b"x"),
            "changed: variables/variables",
        ),
        (lambda folder: (folder / "assets/labels.txt").unlink(), "damaged"),
        (lambda folder: (folder / "README.md").unlink(), "missing: README.md"),
        (lambda folder: (folder / "more").write_text("x"), "not listed: more"),
        (lambda folder: (folder / "assets.extra/manifest.sha256").unlink(), "not a version that graftserve"),
        (lambda folder: (folder / "assets.extra/contract.json").unlink(), "not a version that graftserve"),
    ],
)
def test_a_damaged_version_is_refused(copied: Path, damage, message: str) -> None:
    damage(copied)
    with pytest.raises((ManifestError, VerificationError), match=message):
        verify_version(copied)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "saved_model.pb").write_bytes(b"x"), "does not load in a Session"),
        (
            lambda folder: (folder / "assets.extra/tf_serving_warmup_requests").write_bytes(b"x" * 100),
            "tf_serving_warmup_requests: missing or damaged",
        ),
        (
            lambda folder: (folder / "assets.extra/network.tflite").write_bytes(b"x"),
            "cannot be loaded by LiteRT",
        ),
        (lambda folder: (folder / "assets/labels.txt").write_text("a\nb\n"), "has 2 labels, but the goldens"),
        (lambda folder: rewrite_goldens(folder, lambda rows: rows.clear()), "holds no golden image"),
    ],
)
def test_damage_with_the_right_sums_is_found_as_well(copied: Path, damage, message: str) -> None:
    damage(copied)
    write_manifest(copied)
    with pytest.raises(ExportError, match=message):
        verify_version(copied)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"require_accuracy": 1.0}, "accuracy: expected at least 1, got 0"),
        ({"require_top5": 1.0}, r"top-5 accuracy: expected at least 1, got 0\.\d+ on \d+ test images"),
    ],
)
def test_gates_hold_a_version_back(trained, tmp_path: Path, options, message: str) -> None:
    assert trained.metrics["evaluation"]["test"]["accuracy"] < 1
    assert trained.metrics["evaluation"]["test"]["top5_accuracy"] < 1
    with pytest.raises(GateError, match=message):
        export_run(trained.path, tmp_path / "digits", **options)
    assert published_versions(tmp_path / "digits") == []


def test_a_gate_on_the_latency(tiny, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"latency: expected at most 0.001 ms for one image, got \d"):
        export_model(tiny, tmp_path / "tiny", ExportOptions(max_latency_ms=0.001, **QUICK))
    assert published_versions(tmp_path / "tiny") == []
    version = export_model(tiny, tmp_path / "tiny", ExportOptions(max_latency_ms=60_000, **QUICK))
    assert 0 < version.check.latency_ms < 60_000


def test_a_gate_needs_something_to_judge_by(tiny, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="there are no test images to judge by"):
        export_model(tiny, tmp_path / "tiny", ExportOptions(require_accuracy=0.1))


def test_what_the_serving_check_finds_holds_a_version_back(tiny, tmp_path: Path) -> None:
    seen = []

    def refuse(model_base_path: Path, model_name: str):
        seen.append((published_versions(model_base_path), model_name, model_base_path.parent.name))
        raise VerificationError("it does not serve")

    with pytest.raises(VerificationError, match="it does not serve"):
        export_model(tiny, tmp_path / "tiny", ExportOptions(serving_check=refuse, **QUICK))
    assert seen == [([1], "tiny", "tiny")]
    assert list((tmp_path / "tiny").iterdir()) == []


def test_old_versions_go_but_not_those_in_use(tiny, tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    for number in (1, 2, 3, 4):
        (base / str(number)).mkdir(parents=True)
    config = tmp_path / "models.config"
    config.write_text(
        'model_config_list { config { name: "tiny" base_path: "/x" model_platform: "tensorflow"\n'
        '  version_labels { key: "stable" value: 1 } logging_config { } } }'
    )
    version = export_model(tiny, base, ExportOptions(keep=2, model_config_file=config, **QUICK))
    assert version.pruned == (2, 3)
    assert published_versions(base) == [1, 4, 5]


def test_a_head_that_does_not_match_the_labels(trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    (run / "labels.txt").write_text("a\nb\n")
    with pytest.raises(SourceError, match=r"the head has 10 classes, but labels.txt has 2 lines"):
        export_run(run, tmp_path / "digits")


def test_an_input_side_that_does_not_match_the_backbone(trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["preprocess"]["side_px"] = 160
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(SourceError, match=r"takes images of \[224, 224, 3\], but the run decodes to \[160"):
        export_run(run, tmp_path / "digits")


def test_weights_that_are_no_numbers(trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    model = trained.load_model()
    logits = model.get_layer("head").get_layer("logits")
    kernel, bias = logits.get_weights()
    logits.set_weights([kernel, bias * np.nan])
    model.save(run / "model.keras")
    with pytest.raises(SourceError, match=r"1 weights are not finite numbers, the first: .*logits/bias"):
        export_run(run, tmp_path / "digits")


def test_a_folder_that_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="does not load in a Session"), open_signatures(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_leaves_nothing(trained, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        export_run(trained.path, tmp_path / "digits")


def test_a_file_in_the_way_leaves_nothing(trained, tmp_path: Path) -> None:
    (tmp_path / "digits").write_text("in the way")
    with pytest.raises(StoreError, match="digits: cannot be written: "):
        export_run(trained.path, tmp_path / "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
