"""The LiteRT engine on a real export: the same answers as TensorFlow, and TensorFlow where it cannot."""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftserve.client.wire import Example
from graftserve.client.wire.contract import INT8_TOLERANCE
from graftserve.export.manifest import write_manifest
from graftserve.serving.engines import ModelEngine
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.flags import Options
from graftserve.serving.litert import TOLERANCE, LiteRtServable, can_load
from graftserve.serving.loader import TensorFlowEngine
from graftserve.serving.metrics import Metrics
from graftserve.serving.servable import Array, Servable, ServableId

DIGITS = ServableId("digits", 1)
EXTRA = Path("assets.extra")


@pytest.fixture(scope="module")
def tensorflow(exported: Any) -> Iterator[Servable]:
    servable = TensorFlowEngine().load(DIGITS, exported.path)
    yield servable
    servable.close()


@pytest.fixture(scope="module")
def litert(exported: Any) -> Iterator[LiteRtServable]:
    servable = load(exported.path)
    yield servable
    servable.close()


@pytest.fixture(scope="module")
def images(exported: Any, photos: dict[str, Any], encode: Callable[..., bytes]) -> list[bytes]:
    """Photographs and digits in several formats, between bytes that are no image."""
    digits = sorted((exported.path / EXTRA / "goldens").glob("*.jpg"))
    return [
        encode(photos["chelsea"]),
        b"no image",
        encode(photos["coffee"], "PNG"),
        digits[0].read_bytes(),
        b"",
        encode(photos["rocket"])[:2000],
        encode(photos["rocket"], "WEBP"),
        digits[1].read_bytes(),
    ]


VALID = [True, False, True, True, False, False, True, True]


def load(path: Path, **settings: Any) -> LiteRtServable:
    def fallback() -> Servable:
        return TensorFlowEngine().load(DIGITS, path)

    return LiteRtServable.load(path, **{"max_queued_images": 1000, "fallback": fallback} | settings)


def ask(servable: Servable, name: str, value: Array, outputs: list[str] | None = None) -> dict[str, Array]:
    signature = servable.signatures[name]
    (key,) = signature.inputs
    wanted = list(signature.outputs) if outputs is None else outputs
    return dict(zip(wanted, servable.run(signature, {key: value}, wanted, 60), strict=True))


def strings(values: list[bytes]) -> Array:
    return np.array(values, object)


def example(*images: bytes, key: str = "image/encoded") -> bytes:
    message = Example()
    message.features.feature[key].bytes_list.value.extend(images)
    return message.SerializeToString()


def assert_same(given: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert given.keys() == expected.keys()
    for name, values in expected.items():
        assert given[name].shape == values.shape, name
        assert given[name].dtype == values.dtype, name
        if values.dtype == np.float32:
            np.testing.assert_allclose(given[name], values, atol=TOLERANCE, err_msg=name)
        else:
            assert given[name].tolist() == values.tolist(), name


@pytest.mark.parametrize("name", ["serving_default", "features"])
def test_the_same_answers_from_images(
    litert: Servable, tensorflow: Servable, images: list[bytes], name: str
) -> None:
    given = ask(litert, name, strings(images))
    assert_same(given, ask(tensorflow, name, strings(images)))
    assert given["valid"].tolist() == VALID
    assert litert.engine == "litert"


def test_the_same_answers_from_pixels(litert: Servable, tensorflow: Servable) -> None:
    pixels = np.random.default_rng(7).integers(0, 256, (3, 224, 224, 3), np.uint8)
    assert_same(ask(litert, "pixels", pixels), ask(tensorflow, "pixels", pixels))


def test_the_same_answers_from_examples(litert: Servable, tensorflow: Servable, images: list[bytes]) -> None:
    given = strings([*map(example, images), example(images[0], key="picture")])
    assert_same(ask(litert, "classify", given), ask(tensorflow, "classify", given))
    odd = strings([b"not an Example", example(), example(images[0], images[3])])
    assert ask(litert, "classify", odd)["scores"].any() == np.False_


@pytest.mark.parametrize(
    ("name", "shape"), [("serving_default", (0,)), ("features", (0,)), ("pixels", (0, 224, 224, 3))]
)
def test_no_image_is_answered_too(
    litert: Servable, tensorflow: Servable, name: str, shape: tuple[int, ...]
) -> None:
    empty = np.zeros(shape, np.uint8 if name == "pixels" else object)
    assert_same(ask(litert, name, empty), ask(tensorflow, name, empty))


def test_only_the_outputs_asked_for(litert: Servable, images: list[bytes]) -> None:
    assert list(ask(litert, "serving_default", strings(images), ["valid", "classes"])) == ["valid", "classes"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("serving_default", np.zeros(2, np.float32), "Expects arg[0] to be string but float is provided"),
        ("serving_default", np.array(b"x", object), "image_bytes: expected the shape [N], got []"),
        ("serving_default", np.array([[b"x"]], object), "image_bytes: expected the shape [N], got [1, 1]"),
        ("pixels", np.zeros((1, 224, 224, 3), np.float32), "Expects arg[0] to be uint8 but float is"),
        (
            "pixels",
            np.zeros((1, 96, 96, 3), np.uint8),
            "images: expected the shape [N, 224, 224, 3], got [1, 96, 96, 3]",
        ),
        (
            "serving_default",
            np.full(1025, b"", object),
            "Too many images in one request: expected at most 1024, got 1025.",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(litert: Servable, name: str, value: Array, message: str) -> None:
    with pytest.raises(ServingError) as raised:
        ask(litert, name, value)
    assert raised.value.code is Code.INVALID_ARGUMENT
    assert message in raised.value.message


def test_many_callers_each_get_their_own(litert: Servable, images: list[bytes]) -> None:
    expected = ask(litert, "serving_default", strings(images))["probabilities"]

    def one(row: int) -> Array:
        return ask(litert, "serving_default", strings([images[row]]), ["probabilities"])["probabilities"][0]

    rows = [row % len(images) for row in range(64)]
    with ThreadPoolExecutor(32) as pool:
        for row, given in zip(rows, pool.map(one, rows), strict=True):
            np.testing.assert_array_equal(given, expected[row])


class Gate:
    """Holds the workers at their next image. Given as on_image."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.reached = threading.Semaphore(0)

    def __call__(self, waited_s: float) -> None:
        if not self.is_open.is_set():
            self.reached.release()
            assert self.is_open.wait(30)


def test_a_full_queue_and_a_late_image_are_told_and_leave_no_work(exported: Any, images: list[bytes]) -> None:
    gate = Gate()
    servable = load(exported.path, workers=1, max_queued_images=4, on_image=gate)
    signature = servable.signatures["serving_default"]

    def run(count: int, timeout_s: float | None) -> list[Array]:
        given = {"image_bytes": strings([images[0]] * count)}
        return servable.run(signature, given, ["valid"], timeout_s)

    def run_until_refused() -> None:
        while True:  # the second has still to queue its images
            try:
                run(1, 0.01)
            except ServingError as exc:
                if exc.code is not Code.DEADLINE_EXCEEDED:
                    raise

    with ThreadPoolExecutor(2) as pool:
        gate.is_open.clear()
        first = pool.submit(run, 1, None)
        assert gate.reached.acquire(timeout=30)
        with pytest.raises(ServingError, match="DEADLINE_EXCEEDED"):
            run(6, 0.05)  # more than there is room for, but a request by itself finds it
        second = pool.submit(run, 4, None)
        with pytest.raises(ServingError, match="UNAVAILABLE: Too many images are waiting: 4, with room for"):
            run_until_refused()
        gate.is_open.set()
        assert first.result(30)[0].tolist() == [True]
        assert second.result(30)[0].tolist() == [True] * 4
    computed = 0

    def count(waited_s: float) -> None:
        nonlocal computed
        computed += 1

    servable._on_image = count
    assert run(2, None)[0].tolist() == [True, True]
    assert computed == 2  # none of those that came too late
    servable.close()


def engine(**flags: Any) -> ModelEngine:
    return ModelEngine(Options(model_base_path="models", **flags), Metrics())


@pytest.fixture
def copy(exported: Any, tmp_path: Path) -> Path:
    """A copy of the version, to be changed."""
    return Path(shutil.copytree(exported.path, tmp_path / "digits" / "1"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_flag_decides(exported: Any, saved_models: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = saved_models / "half_plus_two"
    for path, flag, expected in [
        (exported.path, "auto", "litert"),
        (exported.path, "tensorflow", "tensorflow"),
        (half, "auto", "tensorflow"),
    ]:
        servable = engine(engine=flag, enable_model_warmup=False).load(DIGITS, path)
        assert servable.engine == expected
        servable.close()
    assert warnings_of(caplog) == []
    engine(engine="litert").load(DIGITS, half).close()
    assert warnings_of(caplog) == [
        "model digits version 1 runs in TensorFlow: --engine=litert takes exported models on a CPU"
    ]


def test_an_export_without_a_network_for_litert_runs_in_tensorflow(copy: Path) -> None:
    (copy / EXTRA / "network.tflite").unlink()
    assert not can_load(copy)


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def flip(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (copy / name).write_bytes(content)


def other_answers(copy: Path) -> None:
    def change(document: Any) -> None:
        document["goldens"][0]["probabilities"][0] += 2e-4

    change_json(copy / EXTRA / "goldens" / "goldens.json", change)
    write_manifest(copy)


def another_format(copy: Path) -> None:
    change_json(copy / EXTRA / "contract.json", lambda document: document.update(format=3))
    write_manifest(copy)


def another_side(copy: Path) -> None:
    change_json(copy / EXTRA / "contract.json", lambda document: document["preprocess"].update(side_px=64))
    write_manifest(copy)


def a_label_too_few(copy: Path) -> None:
    (copy / "assets" / "labels.txt").write_text("0\n1\n")
    write_manifest(copy)


def no_network(copy: Path) -> None:
    (copy / EXTRA / "network.tflite").write_bytes(b"no network")
    write_manifest(copy)


def no_graph(copy: Path) -> None:
    (copy / EXTRA / "decode.pb").write_bytes(b"no graph")
    write_manifest(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copy: flip(copy, "assets.extra/network.tflite"), "network.tflite: damaged (its sum is not"),
        (other_answers, "the golden images' probabilities differ by 2.0e-04 from the original model's"),
        *(
            pytest.param(change, message, marks=pytest.mark.slow)
            for change, message in [
                (
                    lambda copy: flip(copy, "assets.extra/goldens/0.jpg"),
                    "goldens/0.jpg: damaged (its sum is not",
                ),
                (another_format, "contract.json: damaged (ValueError: format 2 expected, got 3)"),
                (another_side, "LiteRT cannot run the network: expected inputs and outputs of the shapes"),
                (a_label_too_few, "labels.txt: damaged (ValueError: 10 labels expected, got 2)"),
                (no_network, "LiteRT cannot run the network: ValueError"),
                (no_graph, "LiteRT cannot run the network: assets.extra/decode.pb: DecodeError"),
            ]
        ),
    ],
)
def test_any_trouble_falls_back_to_tensorflow_with_one_warning(
    copy: Path, change: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(copy)
    servable = engine(enable_model_warmup=False).load(DIGITS, copy)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("model digits version 1 runs in TensorFlow, not in LiteRT: ")
    assert message in warning
    assert servable.engine == "tensorflow"
    servable.close()


def test_an_interpreter_that_fails_hands_over_to_tensorflow(
    exported: Any,
    tensorflow: Servable,
    images: list[bytes],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servable = load(exported.path)

    def fail(network: Any, pixels: Array) -> None:
        raise RuntimeError("Input tensor 0 lacks data")

    monkeypatch.setattr("graftserve.serving.litert._Network.run", fail)
    for _ in range(2):
        given = ask(servable, "serving_default", strings(images))
        assert_same(given, ask(tensorflow, "serving_default", strings(images)))
    assert servable.engine == "tensorflow"
    assert warnings_of(caplog) == [
        f"{exported.path}: LiteRT failed, TensorFlow answers from now on: RuntimeError: Input tensor 0 lacks "
        "data"
    ]
    servable.close()


def test_closing_ends_the_workers(exported: Any) -> None:
    before = threading.active_count()
    servable = load(exported.path, workers=3)
    assert threading.active_count() == before + 3
    servable.close()
    assert threading.active_count() == before


def test_int8_answers_as_its_golden_images_tell(quantized: Any, images: list[bytes]) -> None:
    exact = load(quantized.path)
    int8 = engine(engine="litert_int8", enable_model_warmup=False).load(DIGITS, quantized.path)
    document = json.loads((quantized.path / EXTRA / "goldens" / "goldens.json").read_text())
    goldens = strings(
        [(quantized.path / EXTRA / "goldens" / row["file"]).read_bytes() for row in document["goldens"]]
    )
    by_float, by_int8 = (
        ask(servable, "serving_default", goldens)["probabilities"] for servable in (exact, int8)
    )
    assert np.abs(by_int8 - by_float).max() == pytest.approx(document["int8_difference"], abs=TOLERANCE)
    answers = ask(int8, "serving_default", strings(images))
    assert answers["valid"].tolist() == VALID
    np.testing.assert_allclose(answers["probabilities"].sum(axis=1), VALID, atol=1e-3)
    assert int8.engine == "litert_int8"
    exact.close()
    int8.close()


def test_int8_is_for_versions_that_have_it(exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    servable = engine(engine="litert_int8", enable_model_warmup=False).load(DIGITS, exported.path)
    assert servable.engine == "litert"
    assert warnings_of(caplog) == [
        "model digits version 1 runs in float32: it has no network in int8; export it with --quantize int8"
    ]
    servable.close()


def test_int8_that_answers_otherwise_runs_in_tensorflow(
    quantized: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(quantized.path, tmp_path / "digits" / "1"))

    def change(document: Any) -> None:
        document["goldens"][0]["probabilities"][0] += document["int8_difference"] + 2 * INT8_TOLERANCE

    change_json(copy / EXTRA / "goldens" / "goldens.json", change)
    write_manifest(copy)
    servable = engine(engine="litert_int8", enable_model_warmup=False).load(DIGITS, copy)
    (warning,) = warnings_of(caplog)
    assert "the golden images' probabilities differ by" in warning
    assert servable.engine == "tensorflow"
    servable.close()
