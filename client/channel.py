"""How channels are set up, for either kind of client."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc

__all__ = ["EndedCallError", "channel_options", "open_channel", "pushback_s"]

_OPTIONS: Final[dict[str, str | int]] = {
    # The default of 4 MB for received messages is a few hundred rows of features.
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    # Retries are made here, inside the call's one deadline.
    "grpc.enable_retries": 0,
    # A restarted server is found within a second; gRPC's own ceiling is two minutes.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
    # A name is looked up again when a connection is lost, but no sooner; gRPC waits for 30 s.
    "grpc.dns_min_time_between_resolutions_ms": 2000,
    # A connection whose other end has vanished is noticed during a call. Idle connections are not
    # pinged: servers close those that ping without calls.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    # Two clients in one process get a connection each, with their own backoff.
    "grpc.use_local_subchannel_pool": 1,
}


class EndedCallError(grpc.RpcError):
    """What a call that did not succeed ended with. call: that, which is over.

    gRPC would raise the call itself, and whoever keeps the error would keep that. A call takes a lock when it
    is freed. At the end of a process that lock may be with a thread which Python has stopped already, and the
    process never ends.
    """

    def __init__(self, call: Any) -> None:
        self._code: grpc.StatusCode = call.code()
        self._details: str | None = call.details()
        self._trailing_metadata = call.trailing_metadata()
        super().__init__(f"{self._code.name}: {self._details or ''}")

    def code(self) -> grpc.StatusCode:
        """As that of grpc.Call."""
        return self._code

    def details(self) -> str | None:
        """As those of grpc.Call."""
        return self._details

    def trailing_metadata(self) -> Any:
        """As that of grpc.Call."""
        return self._trailing_metadata


def channel_options(
    health_check: str | None, own: Mapping[str, str | int] | None
) -> list[tuple[str, str | int]]:
    """gRPC's channel arguments; `own` replaces and adds.

    health_check: the service whose health to watch at each address.
    """
    # All addresses that the name has; gRPC's own default keeps to the first.
    service_config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_check is not None:
        service_config["healthCheckConfig"] = {"serviceName": health_check}
    return list({**_OPTIONS, "grpc.service_config": json.dumps(service_config), **(own or {})}.items())


def open_channel(
    target: str, credentials: grpc.ChannelCredentials | None, options: Sequence[tuple[str, str | int]]
) -> grpc.Channel:
    """A channel for threads; without credentials it is not encrypted."""
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)


def pushback_s(metadata: object) -> float | None:
    """What `grpc-retry-pushback-ms` in trailing metadata asks for; negative for "do not retry".

    Source: gRPC proposal A6. A value that is no number means "do not retry", too.
    """
    for key, value in metadata or ():  # type: ignore[attr-defined]  # pairs, by grpc and grpc.aio alike
        if key == "grpc-retry-pushback-ms":
            try:
                return int(value) / 1000
            except ValueError:
                return -1.0
    return None
