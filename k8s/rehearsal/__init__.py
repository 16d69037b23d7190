"""A canary rollout without a cluster: a real Envoy with weights between stable and canary, and real calls.

`envoy` runs the proxy that `envoy_config` describes, `traffic` asks through it all the time, `ramp` moves the
weights and asks the gate of graftserve.k8s.rollout at each, `steps` says whether all went as it must (pure).
No TensorFlow.
"""

from .envoy import Envoy, EnvoyError, find_envoy
from .ramp import WEIGHTS_PERCENT, Ramp
from .steps import GATE, Answer, Rollouts, Step, percentile_s, problems
from .traffic import Traffic, TrafficError

__all__ = [
    "GATE",
    "WEIGHTS_PERCENT",
    "Answer",
    "Envoy",
    "EnvoyError",
    "Ramp",
    "Rollouts",
    "Step",
    "Traffic",
    "TrafficError",
    "find_envoy",
    "percentile_s",
    "problems",
]
