"""How a new version compares with the one that serves, and whether that is good enough. Pure."""

from dataclasses import dataclass

__all__ = ["Gate", "Report"]


@dataclass(frozen=True)
class Report:
    """What a replay of images against both versions showed.

    images: how many were asked about; compared: of how many both gave an answer.
    agreement: the share of those, in [0, 1], with the same best class; NaN if none was compared.
    largest_shift: the most that the score of a class differs on an image, in [0, 1]; shift_image: where.
    latency_ratio: the median time of an answer, canary by stable; NaN if none was compared.
    stable_p50_ms, ...: times of one image asked alone, as the caller sees them.
    errors: images that only the canary did not answer; first_error: what it said.
    stable_errors: images that only stable did not answer. unreadable: images that neither did.
    disagreements: the first of them as (image, stable's class, the canary's class).
    """

    images: int
    compared: int
    agreement: float
    largest_shift: float
    shift_image: str
    latency_ratio: float
    stable_p50_ms: float
    stable_p95_ms: float
    canary_p50_ms: float
    canary_p95_ms: float
    errors: int
    first_error: str = ""
    stable_errors: int = 0
    unreadable: int = 0
    disagreements: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Gate:
    """What a canary must reach to be promoted.

    min_agreement: in [0, 1]. max_shift: in [0, 1]. max_latency_ratio: above 0. max_errors: a count.
    Raises ValueError for values out of range.
    """

    min_agreement: float = 0.98
    max_shift: float = 0.3
    max_latency_ratio: float = 1.5
    max_errors: int = 0

    def __post_init__(self) -> None:
        for name in ("min_agreement", "max_shift"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in [0, 1], got {getattr(self, name)}")
        if not self.max_latency_ratio > 0:
            raise ValueError(f"expected max_latency_ratio above 0, got {self.max_latency_ratio}")
        if self.max_errors < 0:
            raise ValueError(f"expected max_errors of 0 or more, got {self.max_errors}")

    def failures(self, report: Report) -> tuple[str, ...]:
        """What keeps the canary from being promoted, one sentence each; empty if nothing does."""
        found = []
        # Each is asked as "not good enough", so that a NaN fails.
        if report.errors > self.max_errors:
            found.append(
                f"errors: {report.errors} of {report.images} images, at most {self.max_errors} allowed; the "
                f"first: {report.first_error}"
            )
        if not report.compared:
            found.append(f"nothing to compare: none of {report.images} images was answered by both versions")
            return tuple(found)
        if not report.agreement >= self.min_agreement:
            example = ""
            if report.disagreements:
                image, stable, canary = report.disagreements[0]
                example = f"; such as {image}: {stable} became {canary}"
            found.append(
                f"agreement {report.agreement:.4f} on {report.compared} images, at least "
                f"{self.min_agreement:g} needed{example}"
            )
        if not report.largest_shift <= self.max_shift:
            found.append(
                f"a score shifted by {report.largest_shift:.3f} on {report.shift_image}, at most "
                f"{self.max_shift:g} allowed"
            )
        if not report.latency_ratio <= self.max_latency_ratio:
            found.append(
                f"latency {report.latency_ratio:.2f} times stable's ({report.canary_p50_ms:.1f} ms against "
                f"{report.stable_p50_ms:.1f} ms), at most {self.max_latency_ratio:g} times allowed"
            )
        return tuple(found)
