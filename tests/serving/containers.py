"""What the images run and what the servers tell: for tests of containers and of manifests."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from graftserve.serving.flags import Options

_SERVING = Path(__file__).parents[2] / "serving"
DOCKERFILES = {"gpu": _SERVING / "Dockerfile", "embedded": _SERVING / "embedded.Dockerfile"}

# What either server tells, and its labels. Source: tensorflow_serving/servables/tensorflow/util.cc,
# tensorflow_serving/batching/batching_session.cc, tensorflow/cc/saved_model/loader.cc; serving/metrics.py.
_COUNTERS_AND_GAUGES = {
    ":tensorflow:serving:request_count": {"model_name", "status"},
    ":tensorflow:cc:saved_model:load_attempt_count": {"model_path", "status"},
    "graftserve_requests_total": {"model_name", "version", "signature", "api", "entrypoint", "code"},
    "graftserve_valid_rows_total": {"model_name", "version"},
    "graftserve_invalid_rows_total": {"model_name", "version"},
    "graftserve_in_flight_requests": set(),
    "graftserve_model_state": {"model_name", "version", "state"},
    "graftserve_model_engine_info": {"model_name", "version", "engine"},
    "process_resident_memory_bytes": set(),
    "process_cpu_seconds_total": set(),
    "process_open_fds": set(),
    "up": set(),
}
_HISTOGRAMS = {
    ":tensorflow:serving:request_latency": {"model_name", "API", "entrypoint"},
    ":tensorflow:serving:runtime_latency": {"model_name", "API", "runtime"},
    ":tensorflow:serving:batching_session:queuing_latency": {"thread_pool_name"},
    ":tensorflow:serving:batching_session:input_batch_size": {"thread_pool_name"},
    ":tensorflow:serving:batching_session:processed_batch_size": {"thread_pool_name"},
    "graftserve_request_seconds": {"model_name", "api", "entrypoint"},
    "graftserve_queue_seconds": {"model_name", "queue"},
    "graftserve_batch_rows": {"model_name"},
}
METRICS: Mapping[str, set[str]] = {
    **_COUNTERS_AND_GAUGES,
    **{f"{name}_{part}": labels for name, labels in _HISTOGRAMS.items() for part in ("sum", "count")},
    **{f"{name}_bucket": labels | {"le"} for name, labels in _HISTOGRAMS.items()},
}


class Dockerfile:
    """Its instructions in order; of the last stage, where that matters."""

    def __init__(self, path: Path) -> None:
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        text = re.sub(r"\\\n", " ", "\n".join(lines))
        self.instructions = [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]
        stages = [index for index, (name, _) in enumerate(self.instructions) if name == "FROM"]
        self.last_stage = self.instructions[stages[-1] :]

    def all(self, name: str) -> list[str]:
        return [value for instruction, value in self.last_stage if instruction == name]

    def command(self, name: str) -> list[str]:
        """The arguments of an instruction in exec form."""
        (value,) = self.all(name)
        parts: list[str] = json.loads(value[value.index("[") :])
        return parts

    @property
    def flags(self) -> list[str]:
        """What the server is called with when the container is run without arguments."""
        entry_point = self.command("ENTRYPOINT")
        first = next(
            index for index, part in enumerate(entry_point) if part.startswith("--") and part != "--"
        )
        return [*entry_point[first:], *self.command("CMD")]

    @property
    def options(self) -> Options:
        return Options.from_args(self.flags)
