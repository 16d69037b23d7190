"""What we say of ourselves, each with the number that it rests on.

To say more, add a line to `CLAIMS`. A target is what would make it true: beside something that is used
instead, to be no worse, which is 1, or what we set out to be; beside a bound, such as the engine alone, to
come within a tenth of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .lookup import LookupFailedError, NotMeasuredError, benchmark_of, find
from .report import Report, is_spread, shown

__all__ = ["CLAIMS", "Claim", "Verdict", "verdicts"]

Met = Literal["yes", "partly", "no"]


@dataclass(frozen=True)
class Claim:
    """path: see `lookup`; of several values, one for each that `*` stands for, the worst counts.

    what: of what. beside: compared with what. target: as in "<= 1.1".
    """

    path: str
    what: str
    beside: str
    target: str

    def is_met_by(self, value: float) -> bool:
        """By one number."""
        return value >= self.bound if self.wants_more else value <= self.bound

    @property
    def wants_more(self) -> bool:
        """A larger number is a better one."""
        return self.target.startswith(">=")

    @property
    def bound(self) -> float:
        """The number of the target."""
        return float(self.target[2:])


@dataclass(frozen=True)
class Verdict:
    """worst: which of several it is of. met: by all rounds, or partly, by some of them."""

    claim: Claim
    value: str
    worst: str
    met: Met

    @property
    def benchmark(self) -> str:
        """That measures it."""
        return benchmark_of(self.claim.path)


CLAIMS = (
    Claim(
        "serving/throughput/callers=8/litert_to_best_peer",
        "server on LiteRT, images/s, 8 callers",
        "best of five servers by hand, TensorFlow",
        ">= 2.5",
    ),
    Claim(
        "serving/throughput/callers=8/litert_to_bare_litert",
        "server on LiteRT, images/s, 8 callers",
        "LiteRT without a server",
        ">= 0.9",
    ),
    Claim(
        "serving/throughput/callers=8/tensorflow_to_best_peer",
        "server on TensorFlow, images/s, 8 callers",
        "best of five servers by hand, TensorFlow",
        ">= 1",
    ),
    Claim(
        "serving/throughput/callers=8/tensorflow_to_bare_signature",
        "server on TensorFlow, images/s, 8 callers",
        "the signature without a server",
        ">= 0.9",
    ),
    Claim(
        "serving/throughput/callers=32/litert_to_best_peer",
        "server on LiteRT, images/s, 32 callers",
        "best of five servers by hand, TensorFlow",
        ">= 2.5",
    ),
    Claim(
        "serving/throughput/callers=32/litert_to_bare_litert",
        "server on LiteRT, images/s, 32 callers",
        "LiteRT without a server",
        ">= 0.9",
    ),
    Claim(
        "serving/throughput/callers=32/tensorflow_to_best_peer",
        "server on TensorFlow, images/s, 32 callers",
        "best of five servers by hand, TensorFlow",
        ">= 1",
    ),
    Claim(
        "serving/throughput/callers=32/tensorflow_to_bare_signature",
        "server on TensorFlow, images/s, 32 callers",
        "the signature without a server",
        ">= 0.9",
    ),
    Claim(
        "serving/latency/litert_p99_to_best_peer",
        "server on LiteRT, p99 at 70% load",
        "best of five servers by hand, TensorFlow",
        "<= 0.5",
    ),
    Claim(
        "serving/latency/tensorflow_p99_to_best_peer",
        "server on TensorFlow, p99 at 70% load",
        "best of five servers by hand, TensorFlow",
        "<= 1",
    ),
    Claim(
        "serving/trivial/*/cpu_to_echo",
        "server, CPU time of a request for next to nothing",
        "grpcio's own server that returns the bytes it got",
        "<= 1.1",
    ),
    Claim(
        "limits/rows/cpus=1,photo=500 px/share_of_limit",
        "server on one CPU, images/s, photographs of 500 px",
        "decoding and the network alone",
        ">= 0.9",
    ),
    Claim(
        "limits/rows/cpus=1,photo=12 megapixels/share_of_limit",
        "server on one CPU, images/s, photographs of 12 megapixels",
        "decoding and the network alone",
        ">= 0.9",
    ),
    Claim(
        "serving_peers/closed_loop/engine=litert,callers=1/images_per_s_of_graftserve_to/*",
        "server on LiteRT, images/s, 1 caller",
        "each server by hand, same engine",
        ">= 1",
    ),
    Claim(
        "serving_peers/closed_loop/engine=litert,callers=8/images_per_s_of_graftserve_to/*",
        "server on LiteRT, images/s, 8 callers",
        "each server by hand, same engine",
        ">= 1",
    ),
    Claim(
        "serving_peers/closed_loop/engine=litert,callers=64/images_per_s_of_graftserve_to/*",
        "server on LiteRT, images/s, 64 callers",
        "each server by hand, same engine",
        ">= 1",
    ),
    Claim(
        "serving_peers/closed_loop/engine=litert,callers=32/images_per_s_of_graftserve_to/*",
        "server on LiteRT, images/s, 32 callers",
        "each server by hand, same engine",
        ">= 1",
    ),
    Claim(
        "serving_peers/closed_loop/engine=litert,callers=32/cpu_of_graftserve_to/*",
        "server on LiteRT, CPU time, 32 callers",
        "each server by hand, same engine",
        "<= 1",
    ),
    Claim(
        "serving_peers/open_loop/engine=litert,share=0.7/p99_of_graftserve_to/*",
        "server on LiteRT, p99 at 70% load",
        "each server by hand, same engine",
        "<= 0.5",
    ),
    Claim(
        "serving_peers/closed_loop/engine=litert,callers=8/images_per_s_of_graftserve_int8_to/*",
        "server on LiteRT in int8, images/s, 8 callers",
        "each server by hand, LiteRT in float32",
        ">= 1.5",
    ),
    Claim(
        "serving_peers/closed_loop/engine=litert,callers=32/images_per_s_of_graftserve_int8_to/*",
        "server on LiteRT in int8, images/s, 32 callers",
        "each server by hand, LiteRT in float32",
        ">= 1.5",
    ),
    Claim(
        "serving_peers/open_loop/engine=litert,share=0.7/p99_of_graftserve_int8_to/*",
        "server on LiteRT in int8, p99 at 70% load",
        "each server by hand, LiteRT in float32",
        "<= 0.5",
    ),
    Claim(
        "serving_peers/large/engine=litert,megapixels=12/images_per_s_of_graftserve_to/*",
        "server on LiteRT, photographs of 12 megapixels a second",
        "each server by hand, same engine",
        ">= 1",
    ),
    Claim(
        "serving_peers/corrupt/engine=litert,corrupt=100/images_per_s_of_graftserve_to/*",
        "server on LiteRT, whole images/s, one in a hundred cut off",
        "each server by hand, same engine",
        ">= 1",
    ),
    Claim(
        "exported_signature/request_to_decode_and_network",
        "signature, time of a request of 32 images",
        "decoding and the network alone",
        "<= 1.1",
    ),
    Claim(
        "exported_signature/callers_to_best_network",
        "signature, images/s, 32 callers with an image each",
        "the network alone in its best batches",
        ">= 0.9",
    ),
    Claim(
        "client/litert/closed_loop/callers=1/client_to_raw_images_per_s",
        "client, images/s, 1 caller",
        "a raw stub, one image to a request",
        ">= 1",
    ),
    Claim(
        "client/litert/closed_loop/callers=1/client_to_batcher_images_per_s",
        "client, images/s, 1 caller",
        "a batcher by hand",
        ">= 1",
    ),
    Claim(
        "client/litert/closed_loop/callers=8/client_to_raw_images_per_s",
        "client, images/s, 8 callers",
        "a raw stub, one image to a request",
        ">= 1",
    ),
    Claim(
        "client/litert/closed_loop/callers=8/client_to_batcher_images_per_s",
        "client, images/s, 8 callers",
        "a batcher by hand",
        ">= 1",
    ),
    Claim(
        "client/litert/closed_loop/callers=64/client_to_raw_images_per_s",
        "client, images/s, 64 callers",
        "a raw stub, one image to a request",
        ">= 1",
    ),
    Claim(
        "client/litert/closed_loop/callers=64/client_to_batcher_images_per_s",
        "client, images/s, 64 callers",
        "a batcher by hand",
        ">= 1",
    ),
    Claim(
        "client/litert/open_loop/client_to_raw_p99",
        "client, p99 at 70% load",
        "a raw stub, one image to a request",
        "<= 1",
    ),
    Claim(
        "client/accelerator/closed_loop/callers=64/client_to_raw_images_per_s",
        "client, images/s, 64 callers, a pretended accelerator",
        "a raw stub, one image to a request",
        ">= 1",
    ),
    Claim(
        "client_thin/import/times_faster",
        "client, its import, times faster",
        "tensorflow-serving-api with TensorFlow",
        ">= 1",
    ),
    Claim(
        "client_thin/import/times_smaller",
        "client, memory of its import, times smaller",
        "tensorflow-serving-api with TensorFlow",
        ">= 1",
    ),
    Claim(
        "client_thin/encode/times_faster_ours",
        "client, 32 JPEGs to a request, times faster",
        "tensorflow-serving-api with TensorFlow",
        ">= 1",
    ),
    Claim(
        "client_thin/parse/times_faster_ours",
        "client, an answer of 32 rows to lists, times faster",
        "tensorflow-serving-api with TensorFlow",
        ">= 1",
    ),
    Claim(
        "client_peers/ratios_to_graftserve/*/encode",
        "client, 32 JPEGs to a request, times faster",
        "each other client",
        ">= 1",
    ),
    Claim(
        "client_peers/ratios_to_graftserve/*/import",
        "client, its import, times faster",
        "each other client",
        ">= 1",
    ),
    Claim(
        "decode/rows/photo=4000 x 3000, quality 90, EXIF/times_usual",
        "decoding 12 megapixels, times faster",
        "decode_jpeg and tf.image.resize, not antialiased",
        ">= 1",
    ),
    Claim(
        "decode/rows/*/times_usual",
        "decoding photographs of any size, times faster",
        "decode_jpeg and tf.image.resize, not antialiased",
        ">= 1",
    ),
    Claim(
        "decode/rows/*/times_usual_antialiased",
        "decoding photographs of any size, times faster",
        "the same, antialiased as ours is",
        ">= 1",
    ),
    Claim(
        "feature_extraction/ratios_of_images_per_s/litert, extraction / tensorflow, extraction",
        "training's features on LiteRT, images/s",
        "on TensorFlow",
        ">= 1",
    ),
    Claim(
        "feature_extraction/ratios_of_images_per_s/litert, extraction / litert, bare, and decoding",
        "training's features on LiteRT, images/s",
        "what network and decoding leave",
        ">= 0.9",
    ),
    Claim(
        "classic_bottleneck/times_faster/total cold",
        "recipe bottleneck with an empty cache, times faster",
        "the classic script",
        ">= 10",
    ),
    Claim(
        "classic_bottleneck/times_faster/total warm",
        "recipe bottleneck with its features in the cache, times faster",
        "the classic script",
        ">= 20",
    ),
    Claim(
        "classic_keras/times_faster/to_equal_accuracy",
        "recipe two-stage until it is as accurate, times faster",
        "the fine-tuning of Keras's tutorials",
        ">= 1",
    ),
    Claim(
        "soak/rows/*/faults",
        "server under swaps, calls lost or answered wrongly",
        "none",
        "<= 0",
    ),
    Claim(
        "soak/rows/*/during_to_between/slowest_s",
        "server, the slowest call during swaps",
        "the slowest between swaps",
        "<= 1.1",
    ),
    Claim(
        "soak/rows/*/growth_after_swap_10",
        "server, growth of memory after the tenth swap",
        "none",
        "<= 0.05",
    ),
    Claim(
        "prepare/rows/max_side_px=512,quality=90/top_1_agreement",
        "client's Prepare at 512 pixels, the same first class",
        "photographs of 12 megapixels as they are",
        ">= 0.98",
    ),
)


def verdicts(
    reports: Mapping[str, Report], claims: Sequence[Claim] = CLAIMS
) -> tuple[list[Verdict], list[str]]:
    """Of the claims whose benchmark has a result; and what is wrong with those that lead nowhere in it."""
    found, problems = [], []
    for claim in claims:
        try:
            found.append(_verdict(claim, reports))
        except NotMeasuredError:
            continue
        except LookupFailedError as exc:
            problems.append(f"claim {exc}")
    return found, problems


def _verdict(claim: Claim, reports: Mapping[str, Report]) -> Verdict:
    values = find(reports, claim.path)
    choose = min if claim.wants_more else max
    stars = choose(values, key=lambda stars: _ends(values[stars])[1])
    passed = [claim.is_met_by(end) for end in _ends(values[stars])]
    met: Met = "yes" if all(passed) else "partly" if any(passed) else "no"
    worst = " · ".join(stars) if len(values) > 1 else ""
    return Verdict(claim, shown(values[stars]), worst, met)


def _ends(value: Any) -> tuple[float, float, float]:
    if isinstance(value, Mapping) and is_spread(value):
        return value["min"], value["median"], value["max"]
    return value, value, value
