"""Loads a version into the engine that suits it and warms it up, and says how long it took.

    an exported version on a CPU -> LiteRT, in int8 if that is asked for and there
    everything else, and what LiteRT cannot do -> TensorFlow
    with --enable_batching: what runs in TensorFlow and does not gather requests itself -> batched

Source: tensorflow_serving/servables/tensorflow/saved_model_bundle_factory.cc.
"""

import json
import logging
import os
import time
from pathlib import Path

from .batch_scheduler import BatchScheduler
from .batching import BatchingServable
from .batching_options import VERSION_FILE, BatchingOptions, read_batching
from .errors import Code, ServingError
from .flags import Options
from .litert import CONTRACT_FILE, LiteRtServable, can_load, has_int8
from .loader import TensorFlowEngine, has_gpu, read_records, session_config
from .metrics import Metrics
from .servable import Servable, ServableId
from .warmup import WARMUP_FILE, warm_up

__all__ = ["ModelEngine"]

_log = logging.getLogger(__name__)


class ModelEngine:
    """What the flags make of a version's folder.

    Raises ServingError (INVALID_ARGUMENT) if a file that a flag names cannot be read.
    """

    def __init__(self, options: Options, metrics: Metrics) -> None:
        self._options = options
        self._metrics = metrics
        self._session_config = session_config(options)
        self._tensorflow = TensorFlowEngine(options.tags, self._session_config)
        self._batching = read_batching(options)
        if self._batching is not None:
            self._scheduler = BatchScheduler(
                self._batching.num_batch_threads, self._batching.thread_pool_name
            )
        elif options.enable_per_model_batching_parameters:
            _log.warning("--enable_per_model_batching_parameters: does nothing without --enable_batching")
        self._use_litert = options.engine != "tensorflow" and not has_gpu()
        if self._use_litert:
            # Each Session then has threads of its own, and LiteRT's decoding is best with one (see litert):
            # read by TensorFlow at its first Session. Source: tensorflow/core/common_runtime/local_device.cc.
            os.environ.setdefault("TF_OVERRIDE_GLOBAL_THREADPOOL", "1")

    def load(self, servable_id: ServableId, path: Path) -> Servable:
        """Load and warm up the version in `path`. Raises ServingError."""
        began_s = time.perf_counter()
        code = Code.UNKNOWN
        try:
            servable = self._load(servable_id, path)
            code = Code.OK
        except ServingError as exc:
            code = exc.code
            raise
        finally:
            self._metrics.loaded(str(path), code, time.perf_counter() - began_s)
        try:
            if self._options.enable_model_warmup:
                self._warm_up(servable, path)
        except BaseException:
            servable.close()
            raise
        return servable

    def _load(self, servable_id: ServableId, path: Path) -> Servable:
        if self._use_litert and can_load(path):
            try:
                servable = LiteRtServable.load(
                    path,
                    int8=self._takes_int8(servable_id, path),
                    max_queued_images=self._options.max_queued_requests,
                    fallback=lambda: self._tensorflow.load(servable_id, path),
                    session_config=self._session_config,
                    on_image=lambda seconds: self._metrics.waited(servable_id.name, "engine", seconds),
                )
                if self._batching is not None:
                    _log.info("model %s is not batched: LiteRT is fastest image by image", servable_id)
                return servable
            except ServingError as exc:
                _log.warning("model %s runs in TensorFlow, not in LiteRT: %s", servable_id, exc.message)
        elif self._options.engine in ("litert", "litert_int8"):
            _log.warning(
                "model %s runs in TensorFlow: --engine=%s takes exported models on a CPU",
                *(servable_id, self._options.engine),
            )
        batching = self._batching_of(servable_id, path)
        if batching is None:
            return self._tensorflow.load(servable_id, path)
        return BatchingServable(
            self._tensorflow.load(servable_id, path),
            *(batching, self._scheduler, servable_id.name, self._metrics),
        )

    def _takes_int8(self, servable_id: ServableId, path: Path) -> bool:
        if self._options.engine != "litert_int8":
            return False
        if not has_int8(path):
            _log.warning(
                "model %s runs in float32: it has no network in int8; export it with --quantize int8",
                servable_id,
            )
            return False
        return True

    def _batching_of(self, servable_id: ServableId, path: Path) -> BatchingOptions | None:
        """How requests for a version that runs in TensorFlow are gathered; None for not at all."""
        batching = self._batching
        if batching is None:
            return None
        if self._options.enable_per_model_batching_parameters:
            batching = batching.of_version(path)
            if batching is None:
                _log.info("model %s is not batched: it brings no %s", servable_id, VERSION_FILE)
        elif _gathers_itself(path):
            _log.info("model %s is not batched again: it gathers images in its graph", servable_id)
            return None
        return batching

    def _warm_up(self, servable: Servable, path: Path) -> None:
        file = path / WARMUP_FILE
        if not file.exists():
            return
        began_s = time.perf_counter()
        code, count = Code.UNKNOWN, 0
        try:
            iterations = max(1, self._options.num_request_iterations_for_warmup)
            count = warm_up(
                *(servable, read_records(file), iterations),
                is_busy=self._metrics.is_busy,
                every_size=servable.engine == "tensorflow",
            )
            code = Code.OK
        except ServingError as exc:
            code = exc.code
            raise
        finally:
            self._metrics.warmed_up(str(path), code, time.perf_counter() - began_s, count)


def _gathers_itself(path: Path) -> bool:
    """Whether `graftserve export` put batching into the version's graph."""
    try:
        document = json.loads((path / CONTRACT_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("batching") is not None
