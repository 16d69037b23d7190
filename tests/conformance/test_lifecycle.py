"""Versions that come, go and fail, policies, labels, reloads, warmup: while the server runs."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ask = Callable[..., tuple[int, Any]]
Publish = Callable[[str, Path], Path]
Await = Callable[[str, int, str], Any]

ALL = "model_version_policy { all {} }"


@pytest.fixture
def value(prediction: Any, request_of: Any) -> Callable[..., tuple[int, float]]:
    """value(model, version=..., label=...): the version that answers, and its answer to 1."""

    def value(model: str, **spec: Any) -> tuple[int, float]:
        response = prediction.Predict(request_of(model, x=[1.0], **spec), timeout=30)
        return response.model_spec.version.value, response.outputs["y"].float_val[0]

    return value


TWO, THREE = 2.5, 3.5


def label(name: str, version: int) -> str:
    return f'version_labels {{ key: "{name}" value: {version} }}'


def test_a_new_version_takes_over_and_the_old_one_goes(
    folder: Path, publish: Publish, reload: Any, config_of: Any, value: Any, await_state: Await, failure: Any
) -> None:
    publish("half_plus_two", folder / "1")
    assert reload(config_of(folder.name, folder)).status.error_code == 0
    assert value(folder.name) == (1, TWO)
    publish("half_plus_three", folder / "2")
    gone = await_state(folder.name, 1, "END")
    assert gone.status.error_code == 0
    await_state(folder.name, 2, "AVAILABLE")
    assert value(folder.name) == (2, THREE)
    assert failure(lambda: value(folder.name, version=1)) == (
        "NOT_FOUND",
        f"Servable not found for request: Specific({folder.name}, 1)",
    )


def test_folders_that_are_no_versions_are_passed_over(
    folder: Path, publish: Publish, reload: Any, config_of: Any, states_of: Any
) -> None:
    publish("half_plus_two", folder / "00000007")
    (folder / "notes").mkdir()
    (folder / "12a").mkdir()
    reload(config_of(folder.name, folder, ALL))
    assert set(states_of(folder.name)) == {7}


def test_a_corrupt_new_version_leaves_the_old_one_serving(
    folder: Path,
    publish: Publish,
    reload: Any,
    config_of: Any,
    value: Any,
    await_state: Await,
    states_of: Any,
    ask: Ask,
) -> None:
    publish("half_plus_two", folder / "1")
    reload(config_of(folder.name, folder))
    (folder / "temp").mkdir()
    (folder / "temp" / "saved_model.pb").write_bytes(b"not a protobuf")
    (folder / "temp").rename(folder / "2")
    assert await_state(folder.name, 2, "END").status.error_code != 0
    assert value(folder.name) == (1, TWO)
    states = ask(f"/v1/models/{folder.name}")[1]["model_version_status"]
    assert [(entry["version"], entry["state"]) for entry in states] == [("2", "END"), ("1", "AVAILABLE")]
    assert states[0]["status"]["error_code"] == "DATA_LOSS"
    assert "saved_model.pb" in states[0]["status"]["error_message"]
    # It stays listed when its folder is gone, and what comes next is loaded.
    shutil.rmtree(folder / "2")
    publish("half_plus_three", folder / "3")
    await_state(folder.name, 3, "AVAILABLE")
    assert "saved_model.pb" in states_of(folder.name)[2].status.error_message


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ("", {4}),
        ("model_version_policy { latest {} }", {4}),
        ("model_version_policy { latest { num_versions: 2 } }", {2, 4}),
        (ALL, {1, 2, 4}),
        ("model_version_policy { specific { versions: 1 versions: 2 } }", {1, 2}),
    ],
)
def test_the_policy_says_which_versions_are_served(
    folder: Path,
    publish: Publish,
    reload: Any,
    config_of: Any,
    await_state: Await,
    states_of: Any,
    policy: str,
    versions: set[int],
) -> None:
    for version in (1, 2, 4):
        publish("half_plus_two", folder / str(version))
    reload(config_of(folder.name, folder, policy))
    for version in versions:
        await_state(folder.name, version, "AVAILABLE")
    assert set(states_of(folder.name)) == versions


def test_a_reload_moves_from_one_specific_version_to_another(
    folder: Path, publish: Publish, reload: Any, config_of: Any, value: Any, await_state: Await
) -> None:
    publish("half_plus_two", folder / "1")
    publish("half_plus_three", folder / "2")
    for version, answer in ((2, THREE), (1, TWO)):  # a roll back
        policy = f"model_version_policy {{ specific {{ versions: {version} }} }}"
        reload(config_of(folder.name, folder, policy))
        await_state(folder.name, version, "AVAILABLE")
        if version == 1:
            await_state(folder.name, 2, "END")
        assert value(folder.name) == (version, answer)


def test_labels_over_grpc_and_rest(
    folder: Path,
    publish: Publish,
    reload: Any,
    config_of: Any,
    value: Any,
    await_state: Await,
    ask: Ask,
    failure: Any,
) -> None:
    publish("half_plus_two", folder / "1")
    publish("half_plus_three", folder / "2")
    name = folder.name
    reload(config_of(name, folder, ALL))
    for version in (1, 2):
        await_state(name, version, "AVAILABLE")
    both = f"{ALL} {label('stable', 1)} {label('canary', 2)}"
    assert reload(config_of(name, folder, both)).status.error_code == 0
    for alias, version in {"stable": 1, "canary": 2}.items():
        assert value(name, label=alias) == (version, version + 1.5)
        path = f"/v1/models/{name}/labels/{alias}"
        assert ask(f"{path}:predict", {"instances": [1]}) == (200, {"predictions": [1.5 + version]})
        states = ask(path)[1]["model_version_status"]
        assert [entry["version"] for entry in states] == [str(version)]
        assert ask(f"{path}/metadata")[1]["model_spec"]["version"] == str(version)
    unknown = "Unrecognized servable version label: old"
    assert failure(lambda: value(name, label="old")) == ("INVALID_ARGUMENT", unknown)
    assert ask(f"/v1/models/{name}/labels/old:predict", {"instances": [1]}) == (400, {"error": unknown})

    # To a version that is not there: refused as a whole, and the old labels stay.
    moved = f"{ALL} {label('stable', 2)} {label('canary', 9)}"
    assert failure(lambda: reload(config_of(name, folder, moved))) == (
        "FAILED_PRECONDITION",
        f"Request to assign label to version 9 of model {name}, which is not currently available for "
        "inference",
    )
    assert value(name, label="stable") == (1, TWO)
    reload(config_of(name, folder, f"{ALL} {label('stable', 2)}"))
    assert value(name, label="stable") == (2, THREE)
    assert failure(lambda: value(name, label="canary"))[0] == "INVALID_ARGUMENT"


def test_a_label_cannot_come_with_its_model(
    folder: Path, publish: Publish, reload: Any, config_of: Any, failure: Any, value: Any
) -> None:
    publish("half_plus_two", folder / "1")
    assert failure(lambda: reload(config_of(folder.name, folder, label("stable", 1)))) == (
        "FAILED_PRECONDITION",
        f"Request to assign label to version 1 of model {folder.name}, which is not currently available for "
        "inference",
    )
    assert failure(lambda: value(folder.name))[0] == "NOT_FOUND"


def test_a_reload_adds_models_and_takes_them_away(
    folder: Path,
    publish: Publish,
    reload: Any,
    config_of: Any,
    value: Any,
    failure: Any,
    await_state: Await,
    api: Any,
    model_service: Any,
) -> None:
    publish("half_plus_two", folder / "one" / "7")
    publish("half_plus_three", folder / "two" / "1")
    one, two = f"{folder.name}-one", f"{folder.name}-two"
    reload(config_of(one, folder / "one"))
    reload(config_of(one, folder / "one"), config_of(two, folder / "two"))
    assert (value(one), value(two)) == ((7, TWO), (1, THREE))
    reload(config_of(two, folder / "two"))
    await_state(one, 7, "END")
    assert failure(lambda: value(one)) == ("NOT_FOUND", f"Servable not found for request: Latest({one})")
    assert value(two) == (1, THREE)
    code, message = failure(lambda: model_service.HandleReloadConfigRequest(api.ReloadConfigRequest()))
    assert (code, message) == (
        "INVALID_ARGUMENT",
        "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is "
        "currently supported",
    )
    twice = config_of(two, folder / "two")
    assert failure(lambda: reload(twice, twice))[0] == "INVALID_ARGUMENT"
    assert value(two) == (1, THREE)


@pytest.mark.better("missing folder")
def test_a_reload_that_names_a_missing_folder_is_refused(
    folder: Path, reload: Any, config_of: Any, failure: Any, value: Any
) -> None:
    code, message = failure(lambda: reload(config_of("x", folder / "missing")))
    assert (code, f"model x: Could not find base path {folder}/missing" in message) == ("NOT_FOUND", True)
    assert value("half_plus_two") == (123, TWO)


def test_a_model_that_cannot_be_loaded_fails_the_reload(
    folder: Path, reload: Any, config_of: Any, failure: Any, states_of: Any
) -> None:
    (folder / "1").mkdir()
    (folder / "1" / "saved_model.pb").write_bytes(b"not a protobuf")
    code, message = failure(lambda: reload(config_of(folder.name, folder)))
    assert (code, "1 servable(s) did not become available" in message) == ("UNKNOWN", True)
    state = states_of(folder.name)[1]
    assert state.State.Name(state.state) == "END"


# Warmup


@pytest.fixture
def write_warmup(api: Any) -> Callable[..., None]:
    """write_warmup(version, *requests) writes Predict requests for a version to warm up with."""

    def write_warmup(version: Path, *requests: Any) -> None:
        (version / "assets.extra").mkdir(exist_ok=True)
        path = version / "assets.extra" / "tf_serving_warmup_requests"
        with api.tf.io.TFRecordWriter(str(path)) as writer:
            for request in requests:
                log = api.PredictLog(request=request)
                writer.write(api.PredictionLog(predict_log=log).SerializeToString())

    return write_warmup


def test_warmup_requests_are_run_and_counted(
    folder: Path,
    publish: Publish,
    reload: Any,
    config_of: Any,
    request_of: Any,
    write_warmup: Any,
    value: Any,
    metrics: Callable[[], dict[str, float]],
) -> None:
    good, nameless = request_of(folder.name, x=[1.0]), request_of("", x=[1.0])
    write_warmup(publish("half_plus_two", folder / "1"), good, good, nameless)
    reload(config_of(folder.name, folder))
    assert value(folder.name) == (1, TWO)
    read = {
        series: count
        for series, count in metrics().items()
        if series.startswith(":tensorflow:serving:model_warmup_records_read") and folder.name in series
    }
    assert 3 in read.values()


@pytest.mark.parametrize(
    ("count", "signature", "message"),
    [
        (1, "zz", 'Serving signature key "zz" not found.'),
        (1001, "", "Number of warmup records exceeds the maximum (1000)"),
    ],
)
def test_warmup_that_fails_fails_the_load(
    folder: Path,
    publish: Publish,
    reload: Any,
    config_of: Any,
    request_of: Any,
    write_warmup: Any,
    failure: Any,
    states_of: Any,
    count: int,
    signature: str,
    message: str,
) -> None:
    requests = [request_of(folder.name, signature, x=[1.0])] * count
    write_warmup(publish("half_plus_two", folder / "1"), *requests)
    assert failure(lambda: reload(config_of(folder.name, folder)))[0] == "UNKNOWN"
    assert message in states_of(folder.name)[1].status.error_message


def test_a_warmup_file_that_is_no_tfrecord_fails_the_load(
    folder: Path, publish: Publish, reload: Any, config_of: Any, failure: Any, states_of: Any
) -> None:
    version = publish("half_plus_two", folder / "1")
    (version / "assets.extra").mkdir()
    (version / "assets.extra" / "tf_serving_warmup_requests").write_bytes(struct.pack("<Q", 9) * 5)
    assert failure(lambda: reload(config_of(folder.name, folder)))[0] == "UNKNOWN"
    error = states_of(folder.name)[1].status
    assert error.error_code == 15  # DATA_LOSS
    assert "corrupted record at 0 (Is this even a TFRecord file?)" in error.error_message
    assert "Please verify your warmup data is in TFRecord format." in error.error_message


# Servers of their own flags


@pytest.fixture
def ask_server() -> Callable[..., Any]:
    """ask_server(running, path): the JSON of a GET."""
    from urllib.request import urlopen

    def ask_server(running: Any, path: str) -> Any:
        with urlopen(f"http://{running.rest_address}{path}", timeout=30) as answer:
            return json.load(answer)

    return ask_server


def available(answer: Any) -> set[str]:
    return {entry["version"] for entry in answer["model_version_status"] if entry["state"] == "AVAILABLE"}


def test_an_edited_config_file_is_followed(
    folder: Path, publish: Publish, config_of: Any, launch: Any, ask_server: Any
) -> None:
    for version in (1, 2):
        publish("half_plus_two", folder / "model" / str(version))
    file = folder / "models.config"

    def write(policy: str) -> None:
        entry = config_of("half", folder / "model", f"model_version_policy {{ {policy} }}")
        file.write_text(f"model_config_list {{ {entry} }}")

    def serves(version: str) -> bool:
        return available(ask_server(running, "/v1/models/half")) == {version}

    write("specific { versions: 1 }")
    running = launch(f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=1")
    assert serves("1")
    write("specific { versions: 2 }")
    deadline_s = time.monotonic() + 30
    while not serves("2"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_labels_at_the_start_need_a_flag(
    folder: Path, publish: Publish, config_of: Any, launch: Any, ask_server: Any, start_error: Any
) -> None:
    publish("half_plus_two", folder / "model" / "1")
    file = folder / "models.config"
    entry = config_of("half", folder / "model", label("stable", 1))
    file.write_text(f"model_config_list {{ {entry} }}")
    with pytest.raises(start_error, match="Request to assign label to version 1 of model half"):
        launch(f"--model_config_file={file}")
    running = launch(f"--model_config_file={file}", "--allow_version_labels_for_unavailable_models=true")
    assert available(ask_server(running, "/v1/models/half/labels/stable")) == {"1"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("missing", "Could not find base path"),
        ("v1", "Did you forget to name your leaf directory as a number"),
    ],
)
@pytest.mark.better("start-up errors")
def test_there_has_to_be_a_version_at_the_start(
    folder: Path, launch: Any, start_error: Any, entry: str, message: str
) -> None:
    if entry != "missing":
        (folder / "model" / entry).mkdir(parents=True)
    with pytest.raises(start_error, match=message):
        launch("--model_name=half", f"--model_base_path={folder}/model")


def test_a_model_that_cannot_be_loaded_ends_the_start(folder: Path, launch: Any, start_error: Any) -> None:
    (folder / "1").mkdir()
    (folder / "1" / "saved_model.pb").write_bytes(b"not a protobuf")
    with pytest.raises(start_error, match="did not become available"):
        launch("--model_name=half", f"--model_base_path={folder}", "--max_num_load_retries=0")


def test_warmup_can_be_off(
    folder: Path, publish: Publish, launch: Any, request_of: Any, write_warmup: Any, ask_server: Any
) -> None:
    version = publish("half_plus_two", folder / "1")
    write_warmup(version, request_of("half", "zz", x=[1.0]))
    flags = ("--model_name=half", f"--model_base_path={folder}", "--max_num_load_retries=0")
    running = launch(*flags, "--enable_model_warmup=false")
    assert available(ask_server(running, "/v1/models/half")) == {"1"}


def test_health_and_metrics_are_off_unless_asked_for(
    models_dir: Path, launch: Any, failure: Any, ask_server: Any
) -> None:
    from urllib.error import HTTPError

    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    running = launch("--model_name=half", f"--model_base_path={models_dir}/half_plus_two")
    with grpc.insecure_channel(running.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert failure(lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=10))[0] == "UNIMPLEMENTED"
    with pytest.raises(HTTPError) as caught:
        ask_server(running, "/monitoring/prometheus/metrics")
    caught.value.close()
    assert caught.value.code == 404
