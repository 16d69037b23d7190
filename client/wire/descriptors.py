"""Message classes made at import, from the descriptors in `messages.binpb` and in a pool of our own.

Why not the code that protoc generates: protobuf runs such code only if the runtime is not older than protoc,
and not two majors newer. Descriptors are data that every runtime reads, so the user's environment chooses the
release. In a pool of our own nothing can clash, whatever else the process imports.
Source: https://protobuf.dev/support/cross-version-runtime-guarantee/.

`Any` and the wrappers are in this pool, too, as classes of their own: `google.protobuf.any_pb2.Any` has the
same fields and bytes, but `CopyFrom` between the two is refused.
"""

import pkgutil
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

__all__ = ["AnyMessage", "define"]

_FILE: Final = "messages.binpb"


def _pool() -> DescriptorPool:
    serialized = pkgutil.get_data(__package__, _FILE)
    if serialized is None:
        raise ImportError(f"expected {_FILE} beside this module, but its loader gives no data")
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(serialized).file:  # each after those that it imports
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL: Final = _pool()

if not TYPE_CHECKING:
    AnyMessage = GetMessageClass(_POOL.FindMessageTypeByName("google.protobuf.Any"))


def define(module: str) -> dict[str, Any]:
    """The messages and enums of one `.proto` file by name, as protoc's code would define them.

    module: the full name of the module that holds them, such as "graftserve.client.wire.tensor_pb2".
    """
    file = _POOL.FindFileByName(f"{module.removesuffix('_pb2').replace('.', '/')}.proto")
    names: dict[str, Any] = {"DESCRIPTOR": file}
    for name, enum in file.enum_types_by_name.items():
        names[name] = EnumTypeWrapper(enum)
        names |= {value.name: value.number for value in enum.values}
    for name, descriptor in file.message_types_by_name.items():
        names[name] = _message_class(descriptor, module)
    return names


def _message_class(descriptor: Any, module: str, outer: str = "") -> type[Message]:
    message = GetMessageClass(descriptor)
    # Where it is found: repr shows it, and pickle needs it.
    message.__module__ = module
    message.__qualname__ = outer + descriptor.name
    for nested in descriptor.nested_types:
        if not nested.GetOptions().map_entry:
            # Kept here: protobuf itself forgets a class that nobody holds, and makes another one.
            setattr(message, nested.name, _message_class(nested, module, f"{message.__qualname__}."))
    return message
