"""The descriptors that server reflection shows: our messages under the names of TensorFlow Serving's package.

    grpcurl -plaintext -d '{"model_spec": {"name": "digits"}}' HOST:8500 \\
        tensorflow.serving.ModelService/GetModelStatus

Our own .proto files live in a package of their own and hold no services (see client/wire), so both are put
right here, in a pool that nothing else uses.
Source: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md.
"""

from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, wrappers_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from graftserve.client.wire import PredictRequest
from graftserve.client.wire.methods import METHODS

__all__ = ["descriptor_pool"]

_FOREIGN = (any_pb2, wrappers_pb2, health_pb2, reflection_pb2)
_OURS = f".{PredictRequest.DESCRIPTOR.file.package}."
_PACKAGE = "tensorflow.serving"


def descriptor_pool() -> DescriptorPool:
    """A pool with every service of the server, their messages, health and reflection."""
    pool = DescriptorPool()
    added = {module.DESCRIPTOR.name for module in _FOREIGN}
    for module in _FOREIGN:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)

    def add(file: Any) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        proto = descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb)
        proto.package = _PACKAGE
        for message in proto.message_type:
            _rename(message)
        pool.Add(proto)

    services = descriptor_pb2.FileDescriptorProto(name="services.proto", package=_PACKAGE, syntax="proto3")
    for service in sorted({method.service for method in METHODS}):
        entry = services.service.add(name=service.rpartition(".")[2])
        for method in METHODS:
            if method.service == service:
                entry.method.add(
                    name=method.name,
                    input_type=f".{_PACKAGE}.{method.request.DESCRIPTOR.name}",
                    output_type=f".{_PACKAGE}.{method.response.DESCRIPTOR.name}",
                )
    for method in METHODS:
        for message in (method.request, method.response):
            file = message.DESCRIPTOR.file
            add(file)
            if file.name not in services.dependency:
                services.dependency.append(file.name)
    pool.Add(services)
    return pool


def _rename(message: descriptor_pb2.DescriptorProto) -> None:
    for field in message.field:
        if field.type_name.startswith(_OURS):
            field.type_name = f".{_PACKAGE}.{field.type_name.removeprefix(_OURS)}"
    for nested in message.nested_type:
        _rename(nested)
