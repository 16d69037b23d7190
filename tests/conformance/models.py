"""The models that the suite asks for, small and with answers that can be told in advance.

    .venv/bin/python tests/conformance/models.py /tmp/conformance

writes them, with the server's configuration, and prints the command that serves them with a real TensorFlow
Serving in a container, and the one that then runs the suite against it.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

VERSIONS = {
    "half_plus_two": 123,
    "half_plus_three": 1,
    "text": 3,
    "dtypes": 1,
    "examples": 4,
    "defaults": 1,
    "keras": 1,
}
"""Every model, and its one version."""

NUMBERS = (
    *("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128"),
)
"""The dtypes of the model `dtypes` besides string: it has a signature of that name for each."""

LABELS = ["low", "häufig", "日本"]

# What every server that the suite asks is told besides.
FLAGS = (
    "--enable_grpc_healthcheck_service=true",
    "--file_system_poll_wait_seconds=1",
    "--max_num_load_retries=0",
)


def write_models(folder: Path) -> None:
    """Write what is not there yet: the models, models.config and monitoring.config."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, version in VERSIONS.items():
        if not (folder / name / str(version)).exists():
            temporary = folder / name / f"temp-{os.getpid()}"
            temporary.parent.mkdir(exist_ok=True)
            _BUILDERS[name](tf, temporary)
            temporary.rename(folder / name / str(version))
        entries.append(config_of(name, folder / name))
    (folder / "models.config").write_text(f"model_config_list {{ {' '.join(entries)} }}")
    (folder / "monitoring.config").write_text(
        'prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }'
    )


def config_of(name: str, base_path: Path, more: str = "") -> str:
    """A model's entry in a configuration. more: its policy and labels, in text format."""
    return f'config {{ name: "{name}" base_path: "{base_path}" model_platform: "tensorflow" {more} }}'


def flags_of(folder: Path) -> list[str]:
    """What a server of these models is to be started with, but for its ports."""
    return [
        f"--model_config_file={folder}/models.config",
        f"--monitoring_config_file={folder}/monitoring.config",
        *FLAGS,
    ]


def half_plus(tf: Any, folder: Path, plus: float) -> None:
    """y = x / 2 + plus."""

    class Half(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plus = tf.Variable(plus)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def serve(self, x: Any) -> dict[str, Any]:
            return {"y": x * 0.5 + self.plus}

    module = Half()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})


def _text(tf: Any, folder: Path) -> None:
    """Many signatures; serving_default gives the lengths of strings."""

    class Many(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def text(self, text: Any) -> dict[str, Any]:
            return {"length": tf.strings.length(text)}

        @tf.function(input_signature=[tf.TensorSpec(None, tf.string, name="raw")])
        def echo(self, raw: Any) -> dict[str, Any]:
            return {"text": tf.identity(raw), "raw_bytes": tf.identity(raw), "again": tf.strings.lower(raw)}

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, 2], tf.int64, name="a"),
                tf.TensorSpec([None, 2], tf.float64, name="b"),
            ]
        )
        def add(self, a: Any, b: Any) -> dict[str, Any]:
            total = tf.cast(a, tf.float64) + b
            return {"sum": total, "positive": total > 0, "a": a * 1, "count": tf.size(total)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def divide(self, x: Any) -> dict[str, Any]:
            return {"y": 1.0 / x}

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
        def project(self, x: Any) -> dict[str, Any]:
            return {"y": tf.linalg.matmul(x, tf.constant([[1.0], [2.0]]))}

        @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="x")])
        def scalar(self, x: Any) -> dict[str, Any]:
            return {"y": x * 2.0}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
        def decode(self, image_bytes: Any) -> dict[str, Any]:
            decoded = tf.map_fn(
                lambda content: tf.shape(tf.io.decode_image(content, expand_animations=False)),
                image_bytes,
                fn_output_signature=tf.TensorSpec([3], tf.int32),
            )
            return {"shape": decoded}

        @tf.function(input_signature=[tf.TensorSpec([], tf.string, name="message")])
        def fail(self, message: Any) -> dict[str, Any]:
            return {"y": tf.ensure_shape(tf.io.decode_raw(message, tf.int32), [7])}

        @tf.function(input_signature=[tf.TensorSpec([], tf.string, name="message")])
        def complain(self, message: Any) -> dict[str, Any]:
            with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
                return {"y": tf.identity(message)}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="rounds")])
        def spin(self, rounds: Any) -> dict[str, Any]:
            return {"y": tf.while_loop(lambda i: i < rounds, lambda i: [i + 1], [tf.constant(0)])[0]}

    many = Many()
    names = ("text", "echo", "add", "divide", "project", "scalar", "decode", "fail", "complain", "spin")
    signatures = {name: getattr(many, name) for name in names}
    tf.saved_model.save(many, str(folder), signatures=signatures | {"serving_default": many.text})


def _dtypes(tf: Any, folder: Path) -> None:
    """A signature for each dtype, which gives back what it gets, in any shape."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        signatures = {}
        for name in (*NUMBERS, "string"):
            x = v1.placeholder(tf.as_dtype(name), None, name=name)
            signatures[name] = _signature(tf, {"x": x}, {"y": tf.identity(x)}, "tensorflow/serving/predict")
        _save(tf, session, folder, signatures)


def _examples(tf: Any, folder: Path) -> None:
    """TensorFlow 1: a classifier and regressors of serialized tf.Examples, with a variable and a table."""
    v1 = tf.compat.v1
    classify, regress = "tensorflow/serving/classify", "tensorflow/serving/regress"
    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None], name="tf_example")
        features = tf.io.parse_example(
            serialized,
            {
                "x": tf.io.FixedLenFeature([2], tf.float32),
                "scale": tf.io.FixedLenFeature([], tf.float32, 1.0),
                "name": tf.io.FixedLenFeature([], tf.string, "nobody"),
            },
        )
        x, scale = features["x"], features["scale"]
        weights = v1.get_variable(
            "weights", initializer=tf.constant([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), use_resource=False
        )
        scores = tf.matmul(x, weights) * scale[:, None]
        table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(tf.constant([0, 1, 2], tf.int64), tf.constant(LABELS)), "none"
        )
        classes = tf.tile(table.lookup(tf.constant([[0, 1, 2]], tf.int64)), [tf.shape(x)[0], 1])
        total = tf.reduce_sum(x, axis=1) * scale
        given = {"inputs": serialized}
        signatures = {
            "serving_default": _signature(tf, given, {"classes": classes, "scores": scores}, classify),
            "classes": _signature(tf, given, {"classes": classes}, classify),
            "scores": _signature(tf, given, {"scores": scores}, classify),
            "names": _signature(tf, given, {"classes": features["name"][:, None]}, classify),
            "flat": _signature(tf, given, {"scores": total}, classify),
            "regress": _signature(tf, given, {"outputs": total}, regress),
            "column": _signature(tf, given, {"outputs": total[:, None]}, regress),
            "wide": _signature(tf, given, {"outputs": scores}, regress),
            "predict": _signature(tf, {"examples": serialized}, {"y": total}, "tensorflow/serving/predict"),
        }
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        _save(tf, session, folder, signatures, v1.tables_initializer())


def _defaults(tf: Any, folder: Path) -> None:
    """y = x * factor, where factor may be left out; it is then 3."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x, factor = v1.placeholder(tf.float32, [None], "x"), v1.placeholder(tf.float32, [], "factor")
        signature = _signature(
            tf, {"x": x, "factor": factor}, {"y": x * factor}, "tensorflow/serving/predict"
        )
        signature.defaults["factor"].CopyFrom(tf.make_tensor_proto(3.0))
        _save(tf, session, folder, {"serving_default": signature})


def _keras(tf: Any, folder: Path) -> None:
    """What `model.export` writes: a layer with all its weights one half, on three numbers a row."""
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    model.layers[0].set_weights([weights * 0 + 0.5 for weights in model.layers[0].get_weights()])
    model.export(str(folder), verbose=False)


def _signature(tf: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], method: str) -> Any:
    saved_model = tf.compat.v1.saved_model
    return saved_model.build_signature_def(
        {key: saved_model.build_tensor_info(tensor) for key, tensor in inputs.items()},
        {key: saved_model.build_tensor_info(tensor) for key, tensor in outputs.items()},
        method,
    )


def _save(tf: Any, session: Any, folder: Path, signatures: Mapping[str, Any], main_op: Any = None) -> None:
    builder = tf.compat.v1.saved_model.builder.SavedModelBuilder(str(folder))
    builder.add_meta_graph_and_variables(session, ["serve"], signatures, main_op=main_op)
    builder.save()


_BUILDERS: Mapping[str, Callable[[Any, Path], None]] = {
    "half_plus_two": lambda tf, folder: half_plus(tf, folder, 2.0),
    "half_plus_three": lambda tf, folder: half_plus(tf, folder, 3.0),
    "text": _text,
    "dtypes": _dtypes,
    "examples": _examples,
    "defaults": _defaults,
    "keras": _keras,
}

_COMMANDS = """
docker run --rm --init -p 8500:8500 -p 8501:8501 -v {folder}:{folder}:ro \\
  --entrypoint tensorflow_model_server tensorflow/serving:2.19.1 \\
  --port=8500 --rest_api_port=8501 {flags}

GRAFTSERVE_TFSERVING=localhost:8500 GRAFTSERVE_TFSERVING_REST=localhost:8501 \\
  GRAFTSERVE_CONFORMANCE_MODELS={folder} .venv/bin/python -m pytest tests/conformance
"""

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one argument, the folder to write the models to: it is mounted into the container")
    target = Path(sys.argv[1]).resolve()
    write_models(target)
    sys.stdout.write(_COMMANDS.format(folder=target, flags=" ".join(flags_of(target))))
