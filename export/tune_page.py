"""tuning.html: what `tune` measured, as a curve and a table."""

from importlib.resources import files

from markupsafe import Markup

from graftserve.training.figures import trade_off
from graftserve.training.page import render_page

from .tune import CALLERS, Tuning

__all__ = ["render_tuning"]


def render_tuning(title: str, tuning: Tuning) -> str:
    """The page."""
    threads = sorted({point.threads for point in tuning.points})
    lines = {
        "1 thread" if count == 1 else f"{count} threads": [
            (point.latency_p95_ms, point.images_per_s, str(point.batch_images))
            for point in tuning.points
            if point.threads == count
        ]
        for count in threads
    }
    best = tuning.best.latency_p95_ms, tuning.best.images_per_s
    return render_page(
        files(__package__).joinpath("tune.html").read_text(encoding="utf-8"),
        title=title,
        tuning=tuning,
        callers=CALLERS,
        figure=Markup(trade_off(lines, best, "latency of a batch (95th percentile), ms", "images a second")),
    )
