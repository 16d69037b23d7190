"""The messages and RPCs of TensorFlow Serving's gRPC API, without TensorFlow.

The `.proto` files here are ours; field numbers, enum values and RPC paths are TensorFlow Serving's,
so the bytes on the wire are the same. They live in our own proto package (`graftserve.wire`): a process
may import TensorFlow or tensorflow-serving-api beside them without a clash in the descriptor pool.

`messages.binpb` (the descriptors, see `descriptors`) and the stubs `*_pb2.pyi` are generated: change a
`.proto` file, then run `make wire` (`scripts/generate-wire`, with the grpcio-tools release pinned in
pyproject.toml). Any protobuf runtime from 5.26 on reads them.

`methods` holds the RPCs, `tensors` turns NumPy arrays into TensorProto and back, `values` does so with lists
and without NumPy, and `encoding` makes a request's bytes with one copy of what is large.
"""

from .inference_pb2 import (
    BytesList,
    Class,
    ClassificationRequest,
    ClassificationResponse,
    ClassificationResult,
    Classifications,
    Example,
    ExampleList,
    ExampleListWithContext,
    Feature,
    Features,
    FloatList,
    InferenceResult,
    InferenceTask,
    Input,
    Int64List,
    MultiInferenceRequest,
    MultiInferenceResponse,
    Regression,
    RegressionRequest,
    RegressionResponse,
    RegressionResult,
)
from .model_management_pb2 import ReloadConfigRequest, ReloadConfigResponse
from .model_server_config_pb2 import ModelConfig, ModelConfigList, ModelServerConfig, ModelVersionPolicy
from .prediction_log_pb2 import ClassifyLog, MultiInferenceLog, PredictionLog, PredictLog, RegressLog
from .prediction_pb2 import (
    Code,
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    GetModelStatusRequest,
    GetModelStatusResponse,
    ModelSpec,
    ModelVersionStatus,
    PredictRequest,
    PredictResponse,
    SignatureDef,
    SignatureDefMap,
    StatusProto,
    TensorInfo,
)
from .server_config_pb2 import BatchingParameters, MonitoringConfig, PrometheusConfig, SSLConfig
from .tensor_pb2 import DataType, TensorProto, TensorShapeProto

__all__ = [
    "BatchingParameters",
    "BytesList",
    "Class",
    "ClassificationRequest",
    "ClassificationResponse",
    "ClassificationResult",
    "Classifications",
    "ClassifyLog",
    "Code",
    "DataType",
    "Example",
    "ExampleList",
    "ExampleListWithContext",
    "Feature",
    "Features",
    "FloatList",
    "GetModelMetadataRequest",
    "GetModelMetadataResponse",
    "GetModelStatusRequest",
    "GetModelStatusResponse",
    "InferenceResult",
    "InferenceTask",
    "Input",
    "Int64List",
    "ModelConfig",
    "ModelConfigList",
    "ModelServerConfig",
    "ModelSpec",
    "ModelVersionPolicy",
    "ModelVersionStatus",
    "MonitoringConfig",
    "MultiInferenceLog",
    "MultiInferenceRequest",
    "MultiInferenceResponse",
    "PredictLog",
    "PredictRequest",
    "PredictResponse",
    "PredictionLog",
    "PrometheusConfig",
    "RegressLog",
    "Regression",
    "RegressionRequest",
    "RegressionResponse",
    "RegressionResult",
    "ReloadConfigRequest",
    "ReloadConfigResponse",
    "SSLConfig",
    "SignatureDef",
    "SignatureDefMap",
    "StatusProto",
    "TensorInfo",
    "TensorProto",
    "TensorShapeProto",
]
