"""Configuration files: what they may say, and what is said of those that cannot be used."""

from pathlib import Path

import pytest
from google.protobuf import text_format

from graftserve.client.wire import BatchingParameters, ModelServerConfig, SSLConfig
from graftserve.serving.config import model_settings, read_models, read_text_proto
from graftserve.serving.errors import Code, ServingError
from graftserve.serving.flags import Options
from graftserve.serving.source import All, Latest, Specific

MODELS = """
# Two models, as the documentation of TensorFlow Serving writes them.
model_config_list {
  config {
    name: "first"
    base_path: "/models/first"
    model_platform: "tensorflow"
    model_version_policy { specific { versions: 42 versions: 43 } }
    version_labels { key: "stable" value: 42 }
    version_labels { key: "canary" value: 43 }
  }
  config: { name: 'second', base_path: '/models/second', model_type: TENSORFLOW
            logging_config { log_collector_config { type: "file" } sampling_config { sampling_rate: 0.1 } } }
  config { name: "third" base_path: "/models/third" model_version_policy { all {} } }
  config { name: "fourth" base_path: "/models/fourth" model_version_policy { latest { num_versions: 2 } } }
}
"""


def test_a_config_file_names_models_policies_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "models.config"
    file.write_text(MODELS)
    models = read_models(Options(model_config_file=str(file)))
    assert list(models) == ["first", "second", "third", "fourth"]
    assert [model.servable.policy for model in models.values()] == [
        Specific(frozenset({42, 43})),
        Latest(1),
        All(),
        Latest(2),
    ]
    assert models["first"].version_labels == {"stable": 42, "canary": 43}
    assert models["second"].version_labels == {}
    assert models["third"].servable.base_path == Path("/models/third")


def test_flags_name_one_model() -> None:
    models = read_models(Options(model_name="m", model_base_path="models/m"))
    assert [(model.name, model.servable.base_path) for model in models.values()] == [("m", Path("models/m"))]
    assert models["m"].servable.policy == Latest(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_config_list { config { nam: 'm' } }", 'has no field named "nam"'),
        ("model_config_list { config { name: 'm' ", "expected a ModelServerConfig in text format"),
        ("model_config_list { config { base_path: '/m' } }", r"config\[0\]: expected a name, got none"),
        ("model_config_list { config { name: 'm' } }", "model m: expected a base_path, got none"),
        (
            "model_config_list { config { name: 'm' base_path: '/a' } config { name: 'm' base_path: '/b' } }",
            "Illegal to list model m multiple times",
        ),
        (
            "model_config_list { config { name: 'm' base_path: 's3://bucket/m' } }",
            "expected a local folder, got s3://bucket/m: fetch it first with `graftserve pull`",
        ),
        (
            "model_config_list { config { name: 'm' base_path: '/m' model_platform: 'onnx' } }",
            "expected model_platform 'tensorflow', got 'onnx'",
        ),
        (
            "model_config_list { config { name: 'm' base_path: '/m' model_version_policy { specific {} } } }",
            "policy specific: expected versions, got none",
        ),
        ("", "Expected ServerCore config to have model_config_list set"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named_with_its_fault(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "models.config"
    file.write_text(text)
    with pytest.raises(ServingError, match=message) as caught:
        read_models(Options(model_config_file=str(file)))
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.message.startswith(f"--model_config_file: {file}: ")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=f"--ssl_config_file: cannot read {tmp_path}/gone: No such file"):
        read_text_proto(tmp_path / "gone", SSLConfig(), "--ssl_config_file")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(
        ServingError, match=r"--ssl_config_file: .*binary: expected a SSLConfig in text format"
    ):
        read_text_proto(tmp_path / "binary", SSLConfig(), "--ssl_config_file")


def test_the_documented_batching_file_is_understood(tmp_path: Path) -> None:
    file = tmp_path / "batching.config"
    file.write_text(
        "max_batch_size { value: 128 }\nbatch_timeout_micros { value: 0 }\n"
        "max_enqueued_batches { value: 1000000 }\nnum_batch_threads { value: 8 }\nallowed_batch_sizes: 128\n"
    )
    parameters = read_text_proto(file, BatchingParameters(), "--batching_parameters_file")
    assert (parameters.max_batch_size.value, list(parameters.allowed_batch_sizes)) == (128, [128])


def test_a_custom_config_is_refused() -> None:
    config = ModelServerConfig()
    text_format.Parse("custom_model_config {}", config)
    with pytest.raises(ServingError, match="model_config_list set, got none"):
        model_settings(config)
