"""The images, compose.yaml and the dashboard: linted, parsed, and held against each other and the server.

No container engine is needed; what an image would run is run here where it can be.
"""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from graftserve.client.wire import BatchingParameters, ModelServerConfig, MonitoringConfig
from graftserve.serving.app import Server
from graftserve.serving.batching_options import read_batching
from graftserve.serving.config import model_settings
from graftserve.serving.flags import Options
from tests.serving.containers import DOCKERFILES, METRICS, Dockerfile

promql_parser = pytest.importorskip("promql_parser", reason="needs promql-parser")
yaml = pytest.importorskip("yaml", reason="needs PyYAML")

_ROOT = Path(__file__).parents[2]
_SERVING = _ROOT / "serving"
_CONTAINER = _SERVING / "container"
_CONFIGS = "/etc/serving"


@pytest.fixture(params=DOCKERFILES)
def dockerfile(request: pytest.FixtureRequest) -> Dockerfile:
    return Dockerfile(DOCKERFILES[request.param])


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((_SERVING / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((_CONTAINER / "grafana/dashboards/graftserve.json").read_text())


def _program(name: str) -> str:
    """A program that a development dependency brings."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


# The images


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    command = [_program("hadolint"), "--no-color", "--failure-threshold=style", str(DOCKERFILES[name])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_server_is_below_an_init_and_not_below_a_shell(dockerfile: Dockerfile) -> None:
    entry_point = dockerfile.command("ENTRYPOINT")
    init, server = entry_point[0], entry_point[entry_point.index("--") + 1]
    assert any(value.split()[-1] == init for value in dockerfile.all("COPY"))
    assert Path(server).name in ("tensorflow_model_server", "graftserve")


def test_the_server_is_not_root(dockerfile: Dockerfile) -> None:
    user, _, group = dockerfile.all("USER")[-1].partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_the_flags_are_flags_and_the_ports_are_exposed(dockerfile: Dockerfile) -> None:
    options = dockerfile.options
    assert {int(port) for value in dockerfile.all("EXPOSE") for port in value.split()} == {
        options.port,
        options.rest_api_port,
    }
    assert options.enable_model_warmup
    assert options.enable_grpc_healthcheck_service


def test_a_models_flags_add_to_the_others(dockerfile: Dockerfile) -> None:
    """As `docker run IMAGE --model_name=...` has it: the arguments replace CMD alone."""
    given = ["--model_name=cars", "--model_base_path=/models/cars", "--grpc_max_threads=7"]
    flags = dockerfile.flags[: -len(dockerfile.command("CMD"))]
    options = Options.from_args([*flags, *given])
    assert (options.model_name, options.grpc_max_threads) == ("cars", 7)
    assert not options.model_config_file
    assert options.monitoring_config_file == dockerfile.options.monitoring_config_file


def test_the_files_that_flags_name_are_in_the_image(dockerfile: Dockerfile) -> None:
    named = {flag.partition("=")[2] for flag in dockerfile.flags if f"={_CONFIGS}/" in flag}
    copied = set()
    for value in dockerfile.all("COPY"):
        *sources, target = value.split()
        if not sources[0].startswith("--from="):
            copied |= {f"{target.rstrip('/')}/{Path(source).name}" for source in sources}
    assert named == copied


def test_what_is_copied_is_there_and_in_the_context(dockerfile: Dockerfile) -> None:
    sources = [
        source
        for name, value in dockerfile.instructions
        if name == "COPY" and not value.startswith("--from=")
        for source in value.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (_ROOT / source).exists(), source
        assert source == "." or _in_context(Path(source)), source


def test_the_labels(dockerfile: Dockerfile) -> None:
    (labels,) = dockerfile.all("LABEL")
    prefix = "org.opencontainers.image"
    values = dict(re.findall(rf'{re.escape(prefix)}\.([a-z.]+)="([^"]*)"', labels))
    assert {"title", "description", "licenses", "version", "revision", "base.name"} <= set(values)
    image = dockerfile.all("FROM")[0]
    assert values["base.name"].endswith(image)


def test_the_images_of_docker_and_of_the_dockerfile_are_one_release() -> None:
    from graftserve.cli import runtime

    arguments = dict(
        value.split("=")
        for name, value in Dockerfile(DOCKERFILES["gpu"]).instructions
        if name == "ARG" and "=" in value
    )
    image = f"tensorflow/serving:{arguments['TF_SERVING_VERSION']}"
    assert (image, f"{image}-gpu") == (runtime._IMAGE, runtime._GPU_IMAGE)


def _ignore_patterns() -> list[str]:
    lines = (_ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _in_context(path: Path) -> bool:
    """Whether .dockerignore lets a file into the build, its last matching line deciding."""
    allowed = True
    for pattern in _ignore_patterns():
        glob = pattern.removeprefix("!").removeprefix("**/")
        parts = path.parts if pattern.removeprefix("!").startswith("**/") else path.parts[:1]
        if any(fnmatch.fnmatch(part, glob) for part in parts):
            allowed = pattern.startswith("!")
    return allowed


def test_the_context_has_what_is_needed_and_no_more() -> None:
    assert _in_context(Path("serving/app.py"))
    assert not _in_context(Path("serving/__pycache__/app.cpython-312.pyc"))
    for folder in ("models", "runs", ".git", ".venv", "tests", "build"):
        assert not _in_context(Path(folder) / "file"), folder


@pytest.mark.slow
def test_the_wheel_builds_from_the_context_alone(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"

    def ignore(folder: str, names: list[str]) -> list[str]:
        at = Path(folder).relative_to(_ROOT)
        return [name for name in names if not _in_context(at / name)]

    shutil.copytree(_ROOT, source, ignore=ignore)
    # The backend itself and not `pip wheel`, which would fetch one.
    code = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(wheels)!r}))"
    wheels.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    for module in (
        "cli/serve.py",
        "serving/app.py",
        "client/wire/prediction_pb2.py",
        "training/recipes/auto.toml",
        "k8s/base/pod/models.config",
    ):
        assert f"graftserve/{module}" in names


def test_the_dependencies_layer_asks_for_those_of_pyproject(tmp_path: Path) -> None:
    """The image's own script, run on the real file."""
    runs = [value for name, value in Dockerfile(DOCKERFILES["embedded"]).instructions if name == "RUN"]
    (script, extras), *_ = (
        match.groups() for value in runs if (match := re.search(r'python -c "(.*?)" (\S+) >', value))
    )
    arguments = dict(
        value.split("=", 1)
        for name, value in Dockerfile(DOCKERFILES["embedded"]).instructions
        if name == "ARG" and "=" in value
    )
    (wanted,) = shlex.split(arguments["EXTRAS"])
    assert extras == '"${EXTRAS}"'
    shutil.copy(_ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script, wanted], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    # The server's, and those of the stores that init containers pull from.
    expected = optional["serving"] + optional["s3"] + optional["gcs"]
    assert done.stdout.splitlines() == project["dependencies"] + expected


@pytest.fixture(scope="module")
def monitored(
    saved_models: Path, tmp_path_factory: pytest.TempPathFactory, base_options: Mapping[str, Any]
) -> Iterator[Server]:
    """A server with the images' monitoring."""
    base_path = tmp_path_factory.mktemp("base")
    shutil.copytree(saved_models / "half_plus_two", base_path / "1")
    config = str(_CONTAINER / "monitoring.config")
    options = Options(model_base_path=str(base_path), monitoring_config_file=config, **base_options)
    server = Server(options)
    server.start()
    yield server
    server.stop(0)


def _run_health_check(dockerfile: Dockerfile, port: int) -> int:
    (value,) = dockerfile.all("HEALTHCHECK")
    program, *args = json.loads(value[value.index("[") :])
    program = _program("bash") if program == "bash" else sys.executable
    default = str(dockerfile.options.rest_api_port)
    assert any(default in arg for arg in args)
    command = [program, *(arg.replace(default, str(port)) for arg in args)]
    environment = {"http_proxy": "http://127.0.0.1:9"}  # must not be asked
    return subprocess.run(command, env=environment, capture_output=True, timeout=20).returncode


def test_a_server_that_answers_is_healthy(dockerfile: Dockerfile, monitored: Server) -> None:
    assert monitored.rest_port
    assert _run_health_check(dockerfile, monitored.rest_port) == 0


def test_a_server_that_is_not_there_or_answers_with_an_error_is_not_healthy(
    dockerfile: Dockerfile,
    start_server: Callable[..., Server],
    publish: Callable[[str, Path], Path],
    tmp_path: Path,
) -> None:
    publish("half_plus_two", tmp_path / "1")
    without_monitoring = start_server(tmp_path)
    port = without_monitoring.rest_port
    assert port
    assert _run_health_check(dockerfile, port) != 0
    without_monitoring.stop(0)
    assert _run_health_check(dockerfile, port) != 0


# The configuration files


def test_the_models() -> None:
    config = text_format.Parse((_CONTAINER / "models.config").read_text(), ModelServerConfig())
    settings = model_settings(config)
    assert settings
    for name, model in settings.items():
        assert str(model.servable.base_path) == f"/models/{name}"


def test_the_batching() -> None:
    config = text_format.Parse((_CONTAINER / "batching.config").read_text(), BatchingParameters())
    sizes = list(config.allowed_batch_sizes)
    assert sizes == sorted(set(sizes))
    # batching_session.cc: with splitting, the last size is the largest execution.
    assert config.enable_large_batch_splitting.value
    assert sizes[-1] == config.max_execution_batch_size.value <= config.max_batch_size.value
    assert config.num_batch_threads.value > 0
    assert config.max_enqueued_batches.value > 0
    file = str(_CONTAINER / "batching.config")
    ours = read_batching(Options(model_base_path="m", enable_batching=True, batching_parameters_file=file))
    assert ours is not None
    assert ours.allowed_batch_sizes == tuple(sizes)


def test_the_metrics_are_where_everybody_looks(dockerfile: Dockerfile) -> None:
    config = text_format.Parse((_CONTAINER / "monitoring.config").read_text(), MonitoringConfig())
    assert config.prometheus_config.enable
    path = config.prometheus_config.path
    (job,) = _prometheus()["scrape_configs"]
    assert job["metrics_path"] == path
    assert path in dockerfile.all("HEALTHCHECK")[0]


# compose.yaml


def test_compose_follows_the_specification() -> None:
    command = [_program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(_SERVING / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_source_of_a_volume_is_there(compose: Any) -> None:
    named = set()
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            if volume["type"] == "volume":
                named.add(volume["source"])
                continue
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume["source"])
            assert volume["read_only"] is True, (name, source)
            assert volume["bind"] == {"create_host_path": False}, (name, source)
            # The models are the user's; all else is in the repository.
            assert volume["target"] == "/models" or (_SERVING / source).exists(), (name, source)
    assert named == set(compose["volumes"])


def test_the_models_are_where_their_configuration_says(compose: Any) -> None:
    config = text_format.Parse((_CONTAINER / "models.config").read_text(), ModelServerConfig())
    for name in DOCKERFILES:
        volumes = {volume["target"]: volume["source"] for volume in compose["services"][name]["volumes"]}
        assert volumes["/models"].startswith("${MODELS:-")
        assert volumes[_CONFIGS] == "${CONFIG:-./container}"
        for model in config.model_config_list.config:
            assert Path(model.base_path).is_relative_to("/models")


def test_services_wait_only_for_services_that_can_be_healthy(compose: Any) -> None:
    services = compose["services"]
    waits = [
        (name, other, how) for name in services for other, how in services[name].get("depends_on", {}).items()
    ]
    assert waits
    for name, other, how in waits:
        assert how["condition"] == "service_healthy"
        assert "healthcheck" in services[other], name


def test_compose_builds_our_images_and_publishes_their_ports(compose: Any) -> None:
    for name, path in DOCKERFILES.items():
        service = compose["services"][name]
        build = service["build"]
        assert (_SERVING / build["context"]).resolve() == _ROOT
        assert (_SERVING / build["context"] / build["dockerfile"]).resolve() == path
        options = Dockerfile(path).options
        published = {int(port.split(":")[-1]) for port in service["ports"]}
        assert published == {options.port, options.rest_api_port}
    assert compose["services"]["gpu"]["profiles"] == ["gpu"]
    assert "profiles" not in compose["services"]["embedded"]


def test_nothing_is_writable_and_nobody_gains_rights(compose: Any) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_prometheus_and_grafana_are_for_this_machine_only(compose: Any) -> None:
    for name in ("prometheus", "grafana"):
        assert all(port.startswith("127.0.0.1:") for port in compose["services"][name]["ports"])


def test_a_stop_waits_for_the_servers_own(compose: Any) -> None:
    from graftserve.serving import app

    after_grace_s = 2 * app._CUT_OFF_TIMEOUT_S + app._UNLOAD_TIMEOUT_S
    grace_s = Dockerfile(DOCKERFILES["embedded"]).options.shutdown_grace_seconds
    assert float(compose["services"]["embedded"]["stop_grace_period"].rstrip("s")) > grace_s + after_grace_s


def test_images_are_pinned(compose: Any) -> None:
    for service in compose["services"].values():
        if "build" not in service:
            assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"]), service["image"]


# Prometheus and Grafana


def _prometheus() -> Any:
    return yaml.safe_load((_CONTAINER / "prometheus.yml").read_text())


def _provisioning(name: str) -> Any:
    (path,) = (_CONTAINER / "grafana/provisioning" / name).iterdir()
    return yaml.safe_load(path.read_text())


def test_prometheus_asks_either_server(compose: Any) -> None:
    (job,) = _prometheus()["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    for name, path in DOCKERFILES.items():
        assert host in compose["services"][name]["networks"]["default"]["aliases"]
        assert int(port) == Dockerfile(path).options.rest_api_port
    volumes = {volume["source"]: volume["target"] for volume in compose["services"]["prometheus"]["volumes"]}
    command = compose["services"]["prometheus"]["command"]
    assert f"--config.file={volumes['./container/prometheus.yml']}" in command
    assert f"--storage.tsdb.path={volumes['prometheus']}" in command


def test_grafana_asks_prometheus_and_finds_the_dashboard(compose: Any) -> None:
    (source,) = _provisioning("datasources")["datasources"]
    port = compose["services"]["prometheus"]["ports"][0].split(":")[-1]
    assert source["url"] == f"http://prometheus:{port}"
    assert source["jsonData"]["timeInterval"] == _prometheus()["global"]["scrape_interval"]
    grafana = compose["services"]["grafana"]
    volumes = {volume["source"]: volume["target"] for volume in grafana["volumes"]}
    assert volumes["./container/grafana/provisioning"] == "/etc/grafana/provisioning"
    folder = volumes["./container/grafana/dashboards"]
    (provider,) = _provisioning("dashboards")["providers"]
    assert provider["options"]["path"] == folder
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == folder
    assert (_CONTAINER / "grafana/dashboards" / home.name).exists()


def _panels(dashboard: Any) -> list[Any]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def _expressions(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in _panels(dashboard) for target in panel["targets"]]


def _parse(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "1m"))


def _names(expression: str) -> dict[str, set[str]]:
    """The metrics of an expression; with each, the labels that the whole expression uses."""
    names: set[str] = set()
    labels: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
            labels.update(matcher.name for matcher in node.matchers.matchers)
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)

    promql_parser.walk(_parse(expression), visit)
    return dict.fromkeys(names, labels)


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(dashboard: Any) -> None:
    everything = set()
    for expression in _expressions(dashboard):
        for name, labels in _names(expression).items():
            assert name in METRICS, expression
            assert labels <= METRICS[name] | {"instance", "job"}, expression
            everything.add(name)
    for family in (":tensorflow:serving:", ":tensorflow:cc:", "graftserve_", "process_"):
        assert any(name.startswith(family) for name in everything), family


def test_legends_use_labels_that_are_left(dashboard: Any) -> None:
    for panel in _panels(dashboard):
        for target in panel["targets"]:
            (labels, *_) = _names(target["expr"]).items()
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= labels[1] | METRICS[labels[0]] | {"instance"}, target


def test_our_server_tells_what_the_dashboard_shows(dashboard: Any, monitored: Server) -> None:
    """Of the metrics that it has after its first requests: the same names, the same labels."""
    address = f"http://127.0.0.1:{monitored.rest_port}"
    body = b'{"instances": [1.0]}'
    urllib.request.urlopen(f"{address}/v1/models/default:predict", body, 30).close()
    with urllib.request.urlopen(f"{address}/monitoring/prometheus/metrics", timeout=30) as answer:
        lines = re.findall(r"^([\w:]+)(?:{(.*)})? ", answer.read().decode(), re.MULTILINE)
    told = {name: set(re.findall(r'(\w+)="', labels)) for name, labels in lines}
    shown = {name for expression in _expressions(dashboard) for name in _names(expression)}
    for name in shown & set(told):
        assert told[name] == METRICS[name], name
    assert {
        ":tensorflow:serving:request_count",
        ":tensorflow:serving:request_latency_bucket",
        ":tensorflow:cc:saved_model:load_attempt_count",
        "graftserve_requests_total",
        "graftserve_request_seconds_bucket",
        "graftserve_model_state",
        "graftserve_in_flight_requests",
    } <= shown & set(told)


def test_the_dashboard_names_its_data_source_and_variables(dashboard: Any) -> None:
    (source,) = _provisioning("datasources")["datasources"]
    for thing in [*_panels(dashboard), *dashboard["templating"]["list"]]:
        assert thing["datasource"] == {"type": source["type"], "uid": source["uid"]}
    known = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    for expression in _expressions(dashboard):
        assert set(re.findall(r"\$(\w+)", expression)) <= known, expression
    (job,) = _prometheus()["scrape_configs"]
    for variable in dashboard["templating"]["list"]:
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
        assert match
        (name,) = _names(match[1])
        assert match[2] in METRICS[name] | {"instance"}
    assert f'job="{job["job_name"]}"' in json.dumps(dashboard).replace('\\"', '"')


def test_the_panels_fit(dashboard: Any) -> None:
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
