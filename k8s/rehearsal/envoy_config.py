"""What Envoy is told: clusters for stable and canary, a listener for gRPC, routes with weights. Pure.

The routes are in a file of their own, which Envoy reads again whenever another is renamed to its place; so
weights change without a restart and without writes to the admin interface.

Source: https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/config/core/v3/config_source.proto, and
config/route/v3/route_components.proto (WeightedCluster) there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["CANARY", "LISTENER", "STABLE", "bootstrap", "routes"]

STABLE: Final = "graftserve"
CANARY: Final = "graftserve-canary"
LISTENER: Final = "grpc"

_ROUTES: Final = "weights"
_LOOPBACK: Final = "127.0.0.1"
_TYPES: Final = "type.googleapis.com/envoy"
_FILTERS: Final = f"{_TYPES}.extensions.filters"
_CONNECT_TIMEOUT_S: Final = 5

# What the GRPCRoute of component gateway lets through: reloads of the configuration are not among it.
_MATCHES: Final = (
    {"prefix": "/tensorflow.serving.PredictionService/"},
    {"path": "/tensorflow.serving.ModelService/GetModelStatus"},
    {"prefix": "/grpc.health.v1.Health/"},
)


def bootstrap(stable: Sequence[str], canary: Sequence[str], routes_file: Path) -> dict[str, Any]:
    """The file that Envoy starts with.

    stable, canary: their servers, as host:port with a numeric host.
    routes_file: absolute path of what `routes` makes.
    """
    manager = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": LISTENER,
        "codec_type": "HTTP2",
        "rds": {
            "route_config_name": _ROUTES,
            "config_source": {
                "resource_api_version": "V3",
                "path_config_source": {"path": str(routes_file)},
            },
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_FILTERS}.http.router.v3.Router"},
            }
        ],
    }
    network_filter = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {
        "node": {"id": "rehearsal", "cluster": "rehearsal"},  # Envoy wants them where anything is dynamic
        "admin": {"address": _address(f"{_LOOPBACK}:0")},
        "static_resources": {
            "listeners": [
                {
                    "name": LISTENER,
                    "address": _address(f"{_LOOPBACK}:0"),
                    "filter_chains": [{"filters": [network_filter]}],
                }
            ],
            "clusters": [_cluster(STABLE, stable), _cluster(CANARY, canary)],
        },
    }


def routes(canary_weight_percent: int, version: str) -> dict[str, Any]:
    """The file with the routes: so many of 100 requests, chosen at random, go to the canary.

    version: any name; Envoy shows it once the file is in force.
    Raises ValueError for a weight out of [0, 100].
    """
    if not 0 <= canary_weight_percent <= 100:
        raise ValueError(f"expected a weight in [0, 100], got {canary_weight_percent}")
    weights = [
        {"name": STABLE, "weight": 100 - canary_weight_percent},
        {"name": CANARY, "weight": canary_weight_percent},
    ]
    # timeout 0: the caller's deadline counts, not Envoy's 15 s. No retries: they would hide lost requests.
    action = {"weighted_clusters": {"clusters": weights}, "timeout": "0s"}
    resource = {
        "@type": f"{_TYPES}.config.route.v3.RouteConfiguration",
        "name": _ROUTES,
        "virtual_hosts": [
            {
                "name": "any",
                "domains": ["*"],
                "routes": [{"match": {**match, "grpc": {}}, "route": action} for match in _MATCHES],
            }
        ],
    }
    return {"version_info": version, "resources": [resource]}


def _cluster(name: str, servers: Sequence[str]) -> dict[str, Any]:
    options = f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": _address(server)}} for server in servers]}
            ],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": options,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }


def _address(server: str) -> dict[str, Any]:
    host, _, port = server.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
