"""A model server outside Kubernetes as a Stage: TensorFlow Serving, or `graftserve serve`.

Versions come and go by HandleReloadConfigRequest, the tracks are the version labels `stable` and `canary`.

A reload replaces the whole configuration of a server, which cannot be asked for it. So the configuration
comes from the server's own --model_config_file, which is changed before the server is told, and which a
restart reads; or the caller says that the server has only this model, and what it must be told is known.

Source: tensorflow_serving/apis/model_service.proto, tensorflow_serving/model_servers/server_core.cc.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import grpc

from graftserve.client import Client, InvalidArgumentError, NotFoundError
from graftserve.client.channel import open_channel
from graftserve.client.errors import (
    ClientError,
    FailedPreconditionError,
    from_status,
)
from graftserve.client.metadata import checked_metadata
from graftserve.client.wire import ModelServerConfig, ReloadConfigRequest, ReloadConfigResponse
from graftserve.client.wire.methods import HANDLE_RELOAD_CONFIG_REQUEST

from .config_file import CANARY, STABLE, ModelConfigFile, set_placement
from .errors import RefusedError
from .stage import Observed, Placement

__all__ = ["ModelServer"]

# The server has looked at the request and said no; every other failure may have come after it was done.
_REFUSALS: Final = (InvalidArgumentError, NotFoundError, FailedPreconditionError)
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class ModelServer:
    """One model on one server; a context manager.

    target: gRPC address, of one server: behind a balancer each call would reach another.
    config: the server's --model_config_file; or the base path of the server's only model, as the server
        sees it.
    timeout_s: for each request; a reload of models that are loaded is answered at once.
    credentials, metadata, channel_options: as of Client, for every request.
    """

    def __init__(
        self,
        target: str,
        model: str,
        config: ModelConfigFile | str,
        *,
        timeout_s: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        channel_options: Mapping[str, str | int] | None = None,
    ) -> None:
        self._target = target
        self._model = model
        self._config = config
        self._timeout_s = timeout_s
        self._stack = ExitStack()
        self._metadata = checked_metadata(metadata)
        self._connect = partial(
            Client,
            target,
            model,
            credentials=credentials,
            metadata=metadata,
            channel_options=channel_options,
        )
        self._client = self._stack.enter_context(self._connect(timeout_s=timeout_s))
        self._tracks = {
            label: self._stack.enter_context(self._connect(version_label=label, timeout_s=timeout_s))
            for label in (STABLE, CANARY)
        }
        self._channel = self._stack.enter_context(
            open_channel(target, credentials, [*(channel_options or {}).items()])
        )
        self._reload: Any = self._channel.unary_unary(
            HANDLE_RELOAD_CONFIG_REQUEST.path,
            request_serializer=ReloadConfigRequest.SerializeToString,
            response_deserializer=ReloadConfigResponse.FromString,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def observe(self) -> Observed:
        """The versions, and what the labels resolve to. Raises ClientError, ConfigFileError."""
        configured, pinned = None, frozenset[int]()
        if isinstance(self._config, ModelConfigFile):
            configured, pinned = self._config.placement()
        try:
            versions = {item.version: item for item in self._client.status()}
        except NotFoundError:  # a model that the server does not have yet
            versions = {}
        return Observed(versions, self._labelled(STABLE), self._labelled(CANARY), configured, pinned)

    def apply(self, placement: Placement, expected: Placement | None) -> None:
        """See Stage. Raises RefusedError, ConflictError, ClientError, ConfigFileError."""
        if isinstance(self._config, ModelConfigFile):
            with self._config.changing(placement, expected) as config:
                self._send(config)
            return
        config = ModelServerConfig()
        entry = config.model_config_list.config.add(
            name=self._model, base_path=self._config, model_platform="tensorflow"
        )
        set_placement(entry, placement)
        self._send(config)

    def client(self, version: int, timeout_s: float) -> Client:
        """A client of one version, for the caller to close."""
        return self._connect(version=version, timeout_s=timeout_s)

    def _labelled(self, label: str) -> int | None:
        try:
            return self._tracks[label].metadata().version
        except (InvalidArgumentError, NotFoundError):  # no such label, or on a version that is not AVAILABLE
            return None

    def _send(self, config: ModelServerConfig) -> None:
        try:
            response = self._reload(
                ReloadConfigRequest(config=config), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise self._failure(error.code(), error.details() or "") from error
        if response.status.error_code:
            code = _CODES.get(response.status.error_code, grpc.StatusCode.UNKNOWN)
            raise self._failure(code, response.status.error_message)

    def _failure(self, code: grpc.StatusCode, details: str) -> Exception:
        error: ClientError = from_status(code, target=self._target, model=self._model, details=details)
        if isinstance(error, _REFUSALS):
            return RefusedError(f"{self._target} refuses the configuration: {details or code.name}")
        return error
