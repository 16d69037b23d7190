"""Settings out of range, and how channels are set up."""

import json
import math

import pytest

from graftserve.client.channel import channel_options, pushback_s
from graftserve.client.options import Options, checked_timeout_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ()}, "expected a target"),
        ({"targets": ("a:1", "")}, "expected a target"),
        ({"model": ""}, "expected the model's name"),
        ({"version": 1, "version_label": "canary"}, "got both: 1, 'canary'"),
        ({"timeout_s": 0}, "timeout_s above 0 and finite, got 0"),
        ({"timeout_s": math.inf}, "timeout_s above 0 and finite, got inf"),
        ({"timeout_s": math.nan}, "timeout_s above 0 and finite, got nan"),
        ({"max_batch_images": 0}, "max_batch_images of 1 or more, got 0"),
        ({"max_batch_bytes": 0}, "max_batch_bytes of 1 or more"),
        ({"max_in_flight": -1}, "max_in_flight of 1 or more"),
        ({"max_queued_images": 0}, "max_queued_images of 1 or more"),
        ({"max_queued_bytes": 0}, "max_queued_bytes of 1 or more"),
        ({"max_delay_s": -0.1}, "max_delay_s of 0 or more"),
        ({"max_delay_s": math.nan}, "max_delay_s of 0 or more"),
        ({"target_latency_s": 0}, "target_latency_s above 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"targets": ("a:1",), "model": "m", **options})


def test_options_name_all_targets():
    assert Options(targets=("a:1", "b:2"), model="m").target == "a:1, b:2"


def test_a_timeout_in_range_is_itself():
    assert checked_timeout_s(0.5) == 0.5


def test_channel_options_are_replaced_and_added():
    options = dict(channel_options(None, {"grpc.keepalive_time_ms": 5, "grpc.primary_user_agent": "me"}))
    assert options["grpc.keepalive_time_ms"] == 5
    assert options["grpc.primary_user_agent"] == "me"
    assert options["grpc.enable_retries"] == 0


@pytest.mark.parametrize(
    ("health_check", "expected"),
    [(None, None), ("", {"serviceName": ""}), ("flowers", {"serviceName": "flowers"})],
)
def test_health_is_asked_for_if_wanted(health_check, expected):
    config = json.loads(dict(channel_options(health_check, None))["grpc.service_config"])
    assert config.get("healthCheckConfig") == expected
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, None),
        ((), None),
        ((("other", "1"),), None),
        ((("grpc-retry-pushback-ms", "1500"),), 1.5),
        ((("other", "1"), ("grpc-retry-pushback-ms", "0")), 0.0),
        ((("grpc-retry-pushback-ms", "-1"),), -0.001),
        ((("grpc-retry-pushback-ms", "soon"),), -1.0),
    ],
)
def test_pushback(metadata, expected):
    assert pushback_s(metadata) == expected
