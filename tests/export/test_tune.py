"""Choosing a batching: the rule on made-up points, and the whole of it on a small network."""

from pathlib import Path

import pytest

from graftserve.export import Batching, GateError
from graftserve.export.tune import Point, allowed_sizes, choose, tune
from graftserve.export.tune_page import render_tuning


def point(batch_images: int, threads: int, images_per_s: float, latency_ms: float) -> Point:
    return Point(batch_images, threads, images_per_s, latency_ms * 0.9, latency_ms)


def test_among_the_near_best_the_quickest_wins() -> None:
    points = [
        point(1, 1, 60, 17),
        point(4, 1, 96, 42),
        point(8, 1, 97, 83),
        point(8, 2, 100, 160),
        point(16, 2, 90, 355),
    ]
    assert choose(points) == points[1]


def test_a_limit_on_the_latency_comes_first() -> None:
    points = [point(1, 1, 60, 17), point(4, 1, 96, 42), point(32, 1, 400, 80)]
    assert choose(points) == points[2]
    assert choose(points, max_latency_ms=50) == points[1]
    with pytest.raises(
        GateError, match=r"expected at most 5 ms for a batch, but the quickest takes 17\.0 ms"
    ):
        choose(points, max_latency_ms=5)


def test_equals_are_settled_by_the_smaller_batch() -> None:
    points = [point(8, 2, 100, 40), point(4, 2, 100, 40), point(4, 1, 100, 40)]
    assert choose(points) == points[2]


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, (1,)),
        (8, (1, 2, 3, 4, 5, 6, 7, 8)),
        (16, (1, 2, 3, 4, 5, 6, 7, 8, 16)),
        (48, (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 48)),
    ],
)
def test_sizes_that_are_executed(largest: int, sizes: tuple[int, ...]) -> None:
    assert allowed_sizes(largest) == sizes
    assert Batching(sizes=sizes).sizes[-1] == largest


def test_tuning_measures_every_point_and_leaves_the_version_alone(tiny_version) -> None:
    files = {path: path.read_bytes() for path in tiny_version.path.rglob("*") if path.is_file()}
    reports = []
    tuning = tune(
        tiny_version.path, sizes=(1, 2), threads=(1, 2), seconds_per_point=0.02, listener=reports.append
    )
    assert {(point.batch_images, point.threads) for point in tuning.points} == {
        (1, 1),
        (2, 1),
        (1, 2),
        (2, 2),
    }
    assert all(point.images_per_s > 0 for point in tuning.points)
    assert all(0 < point.latency_p50_ms <= point.latency_p95_ms for point in tuning.points)
    assert tuning.current == Batching()
    assert tuning.chosen in (
        tuning.current,
        Batching(tuning.best.threads, allowed_sizes(tuning.best.batch_images)),
    )
    assert {report.stage for report in reports} == {"measuring batches", "trying the choice"}
    assert {path: path.read_bytes() for path in tiny_version.path.rglob("*") if path.is_file()} == files


def test_the_page_has_the_curve_and_every_point(tiny_version) -> None:
    tuning = tune(tiny_version.path, sizes=(1, 2), threads=(1,), seconds_per_point=0.02)
    page = render_tuning("Batching of <tiny>", tuning)
    assert "Batching of &lt;tiny&gt;" in page
    assert page.count('<td class="number">') == 5 * len(tuning.points)
    assert "<svg " in page
    assert "<script" not in page


def test_tuning_needs_a_version(tmp_path: Path) -> None:
    from graftserve.export import VerificationError

    with pytest.raises(VerificationError, match="no SavedModel"):
        tune(tmp_path)
