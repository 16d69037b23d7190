"""The comparison: what two real servers say of the same images, and where the gate closes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from graftserve.client import Client, Prediction, RetryPolicy, UnavailableError
from graftserve.client.testing import Answer, FakeServer, StatusError
from graftserve.k8s.rollout import Gate, Report, compare
from graftserve.k8s.rollout.shadow import score_shift

EVEN = Report(100, 100, 1.0, 0.0, "a.jpg", 1.0, 5.0, 9.0, 5.0, 9.0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"agreement": 0.98}, None),
        ({"agreement": 0.97}, "agreement 0.9700 on 100 images, at least 0.98 needed"),
        ({"largest_shift": 0.3}, None),
        ({"largest_shift": 0.31}, "a score shifted by 0.310 on a.jpg, at most 0.3 allowed"),
        ({"latency_ratio": 1.5}, None),
        ({"latency_ratio": 1.51}, "latency 1.51 times stable's"),
        ({"latency_ratio": float("nan")}, "latency nan"),
        (
            {"errors": 1, "first_error": "b.jpg: gone"},
            "errors: 1 of 100 images, at most 0 allowed; the first: b",
        ),
        ({"compared": 0, "agreement": float("nan")}, "nothing to compare"),
        ({"stable_errors": 5, "unreadable": 5}, None),
    ],
)
def test_where_the_gate_closes(changes, words) -> None:
    failures = Gate().failures(replace(EVEN, **changes))
    assert len(failures) == (words is not None)
    assert words is None or words in failures[0]


def test_the_gate_names_the_first_image_that_changed() -> None:
    changed = replace(
        EVEN, agreement=0.9, disagreements=(("a.jpg", "rose", "tulip"), ("b.jpg", "rose", "daisy"))
    )
    (failure,) = Gate().failures(changed)
    assert failure.endswith("; such as a.jpg: rose became tulip")


def test_what_a_report_leaves_out_was_not_seen() -> None:
    assert (EVEN.first_error, EVEN.stable_errors, EVEN.unreadable, EVEN.disagreements) == ("", 0, 0, ())


@pytest.mark.parametrize(("errors", "closed"), [(0, False), (2, False), (3, False), (4, True)])
def test_errors_are_allowed_up_to_a_number(errors: int, closed: bool) -> None:
    assert bool(Gate(max_errors=3).failures(replace(EVEN, errors=errors))) == closed


@pytest.mark.parametrize(
    "values",
    [
        {"min_agreement": 0, "max_shift": 0, "max_latency_ratio": 0.5},
        {"min_agreement": 1, "max_shift": 1, "max_latency_ratio": 100},
    ],
)
def test_gates_as_wide_and_as_narrow_as_they_may_be(values) -> None:
    assert Gate(**values).min_agreement == values["min_agreement"]


@pytest.mark.parametrize(
    "values",
    [
        {"min_agreement": 1.1},
        {"max_shift": -1},
        {"max_latency_ratio": 0},
        {"max_latency_ratio": -1},
        {"max_errors": -1},
    ],
)
def test_gates_out_of_range(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Gate(**values)


def said(**scores: float) -> Prediction:
    top = tuple(sorted(scores.items(), key=lambda item: -item[1]))
    return Prediction(*top[0], top, 1)


@pytest.mark.parametrize(
    ("stable", "canary", "shift"),
    [
        (said(a=0.9, b=0.1), said(a=0.9, b=0.1), 0),
        (said(a=0.9, b=0.1), said(b=0.6, a=0.4), 0.5),
        (said(a=0.9, b=0.05), said(a=0.9, c=0.05), 0),  # c may have had 0.05, and b may have it now
        (said(a=0.5, b=0.4), said(a=0.5, c=0.4), 0.3),  # c had at most what a and b left, 0.1
        (said(a=1.0), said(b=1.0), 1),  # other labels
        (said(a=0.5), said(a=float("nan")), 1),
    ],
)
def test_how_far_scores_moved(stable, canary, shift) -> None:
    assert score_shift(stable, canary) == pytest.approx(shift)
    assert score_shift(canary, stable) == pytest.approx(shift)


@pytest.fixture
def images(photos, encode, tmp_path: Path) -> list[Path]:
    paths = []
    for name, photo in photos.items():
        for number in range(4):
            paths.append(tmp_path / f"{name}{number}.jpg")
            paths[-1].write_bytes(encode(photo[: 100 + number, :100]))
    return paths


def asked(
    images: list[Path],
    stable: Callable[[bytes], Answer] | None,
    canary: Callable[[bytes], Answer] | None,
    **options,
) -> Report:
    never = RetryPolicy(max_attempts=1)
    with (
        FakeServer(answer=stable) as old,
        FakeServer(answer=canary, latency_s=options.pop("canary_s", 0.0)) as new,
        Client(old.target, "flowers", retry=never) as first,
        Client(new.target, "flowers", retry=never) as second,
    ):
        return compare(first, second, images, seed=1, max_errors=options.pop("max_errors", 0), **options)


def test_a_version_agrees_with_itself(images) -> None:
    told = []
    report = asked(images, None, None, progress=lambda done, total: told.append((done, total)))
    assert (report.images, report.compared, report.agreement, report.largest_shift) == (12, 12, 1.0, 0.0)
    assert (report.errors, report.disagreements) == (0, ())
    assert 0 < report.stable_p50_ms <= report.stable_p95_ms
    assert told == [(number, 12) for number in range(1, 13)]


def test_disagreement_is_counted_and_shown(images) -> None:
    wrong = {path.read_bytes() for path in images[:3]}
    report = asked(
        images,
        lambda image: {"rose": 0.75, "tulip": 0.25},
        lambda image: {"tulip": 0.875, "rose": 0.125} if image in wrong else {"rose": 0.75, "tulip": 0.25},
    )
    assert report.agreement == 0.75
    assert report.largest_shift == pytest.approx(0.625)
    assert report.shift_image == str(images[0])
    assert report.disagreements == tuple((str(path), "rose", "tulip") for path in images[:3])


def test_slowness_is_seen(images) -> None:
    report = asked(images, None, None, canary_s=0.1)
    assert report.canary_p50_ms >= 100
    assert report.latency_ratio == pytest.approx(report.canary_p50_ms / report.stable_p50_ms)


def test_errors_of_the_canary_end_the_replay(images) -> None:
    def fails(image: bytes) -> Answer:
        raise StatusError(grpc.StatusCode.INTERNAL, "out of memory")

    report = asked(images, None, fails, max_errors=2)
    assert (report.images, report.compared, report.errors) == (3, 0, 3)
    assert "out of memory" in report.first_error


def test_what_neither_can_read_is_not_the_canarys_fault(images, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    bad = images[1].read_bytes()
    report = asked(
        [*images, missing],
        lambda image: None if image == bad else "rose",
        lambda image: None if image in (bad, images[2].read_bytes()) else "rose",
        max_errors=5,
    )
    assert (report.images, report.compared, report.unreadable, report.errors) == (13, 10, 2, 1)
    assert report.first_error.startswith(str(images[2]))
    assert report.agreement == 1.0


def test_what_only_the_canary_reads_is_no_error(images) -> None:
    report = asked(images, lambda image: None, lambda image: "rose")
    assert (report.compared, report.stable_errors, report.errors) == (0, 12, 0)
    assert "nothing to compare" in Gate().failures(report)[0]


def test_a_server_that_is_gone_is_not_an_answer(images) -> None:
    def gone(image: bytes) -> Answer:
        raise StatusError(grpc.StatusCode.UNAVAILABLE, "going away")

    with pytest.raises(UnavailableError):
        asked(images, gone, gone)
