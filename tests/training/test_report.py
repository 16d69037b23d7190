"""The reports: what they say, that nothing of the user's can break them, and that the page stands alone."""

import base64
import hashlib
import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from graftserve.training.evaluate import Evaluation, evaluate
from graftserve.training.figures import learning_curves, reliability_diagram
from graftserve.training.html_report import render_html, write_report_html
from graftserve.training.report import ReportData, render_report

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page; fails at a tag that closes another than the one open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def judged(labels: list[int], answers: list[int], classes: int, score: float = 0.8) -> Evaluation:
    probabilities = np.full((len(labels), classes), (1 - score) / (classes - 1), np.float32)
    probabilities[np.arange(len(labels)), answers] = score
    result = evaluate(probabilities, np.array(labels))
    assert result is not None
    return result


def minimal(**changes: Any) -> ReportData:
    data = ReportData(
        title="lite on flowers",
        recipe={"backbone": "lite", "stages": [{"name": "head", "epochs": 2.0}], "ema_decay": 0.0},
        labels=("daisy", "roses", "tulips"),
        counts={
            "daisy": {"train": 8, "validation": 1, "test": 3},
            "roses": {"train": 4, "validation": 1, "test": 2},
            "tulips": {"train": 2, "validation": 0, "test": 0},
        },
        evaluations={
            "train": judged([0] * 8 + [1] * 4 + [2] * 2, [0] * 8 + [1] * 4 + [2] * 2, 3),
            "validation": judged([0, 1], [0, 1], 3),
            "test": judged([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], 3),
        },
    )
    return replace(data, **changes)


HISTORY = tuple(
    {
        "stage": stage,
        "epoch": float(epoch),
        "loss": None if epoch == 0 else 1.0 / epoch,
        "validation_loss": 1.5 / (epoch + 1),
        "validation_accuracy": 0.5 + epoch / 10,
        "learning_rate": rate,
    }
    for stage, rate in (("head", 1e-3), ("all layers", 1e-4))
    for epoch in range(4)
)
STAGES = (
    {
        "name": "head",
        "unfreeze": "none",
        "trainable_parameters": 12810,
        "parameters": 3426890,
        "epochs": 3.0,
        "stopped": "done",
        "best_epoch": None,
    },
)


@pytest.fixture
def full(encode: Callable[..., bytes], photos: dict[str, Any]) -> ReportData:
    """Every part filled, and what the user named is hostile."""
    path = f"{EVIL}/1.jpg"
    return minimal(
        title=f"lite on {EVIL}",
        recipe={"data_dir": EVIL},
        labels=(EVIL, "a|b", "$x^2$"),
        counts={EVIL: {"train": 3, "test": 3}, "a|b": {"train": 1, "test": 2}},
        temperature=1.5,
        calibrated=judged([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], 3, 0.6),
        history=[entry | {"stage": EVIL} for entry in HISTORY],
        stages=[STAGES[0] | {"name": EVIL, "stopped": EVIL}],
        mistakes=[(path, EVIL, "a|b", 0.8), ('" onerror="x', "a|b", EVIL, 0.7)],
        read_image={path: encode(photos["chelsea"])}.__getitem__,
        skipped=[(EVIL, EVIL)],
        duplicates=[[(EVIL, EVIL, "train"), ("b", "b", "test")]],
        timings={"features": 3.21, "total": 75.0},
        notes=[EVIL],
        auto={"situation": EVIL, "measured": {EVIL: 0.5}, "reasons": [EVIL, {"more": [EVIL]}]},
        weights=EVIL,
    )


def test_the_page_is_whole_and_nothing_of_the_users_is_markup(full: ReportData) -> None:
    html = render_html(full)
    page = Page(html)
    assert page.count("script") == 0
    assert "<script" not in html.lower()
    assert page.text.count("alert(1)") >= 15
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) > 50
    assert len(ids) == len(set(ids))


def test_the_page_asks_for_nothing(full: ReportData) -> None:
    html = render_html(full)
    page = Page(html)
    assert page.count("link") == page.count("iframe") == page.count("object") == 0
    for tag, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")), (tag, name, value)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    policy = next(attrs for tag, attrs in page.elements if "http-equiv" in attrs)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_references_inside_the_page_lead_somewhere(full: ReportData) -> None:
    html = render_html(full)
    ids = {attrs["id"] for _, attrs in Page(html).elements if "id" in attrs}
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', html))
    assert references
    assert references <= ids


def test_the_page_says_how_good_the_model_is() -> None:
    tempered = judged([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], 3, 0.6)
    text = Page(render_html(minimal(temperature=1.5, calibrated=tempered))).text
    result = minimal().evaluations["test"]
    assert result is not None
    low, high = result.accuracy_interval
    assert "60.0% of 5 test images recognised" in text
    assert f"95% confidence interval: {low:.1%} to {high:.1%}" in text
    assert "Calibration error 20.0% → 0.0% at temperature 1.50" in text
    assert "Label among the first five" not in text  # of three classes it always is
    assert "daisy roses 1 33%" in text
    assert "roses daisy 1 50%" in text
    assert "roses 7 50.0% 50.0% 50.0%" in text
    assert "tulips 2 – – –" in text
    assert "stages.0.epochs 2" in text


def test_a_temperature_of_one_is_not_made_much_of() -> None:
    text = Page(render_html(minimal(temperature=1.0, calibrated=minimal().evaluations["test"]))).text
    assert "Calibration error 20.0%" in text
    assert "temperature" not in text


def test_validation_stands_in_for_a_missing_test_and_nothing_for_both() -> None:
    evaluations = minimal().evaluations
    html = render_html(minimal(evaluations=evaluations | {"test": None}))
    assert "100.0% of 2 validation images recognised" in Page(html).text
    assert "Not one of the 2 validation images was taken for something else." in Page(html).text
    nothing = Page(render_html(minimal(evaluations=evaluations | {"test": None, "validation": None})))
    assert "No image was held out" in nothing.text
    assert nothing.text.count("not measured: no images") == 2
    assert nothing.count("svg") == 0


def test_of_many_classes_the_confused_ones_are_shown() -> None:
    classes = 60
    truth = list(range(classes))
    answers = truth.copy()
    answers[50], answers[59] = 59, 50
    names = [f"c{index:02}" for index in range(classes)]
    data = minimal(
        labels=names,
        counts={name: {"test": 1} for name in names},
        evaluations={"test": judged(truth, answers, 60)},
    )
    html = render_html(data)
    text = Page(html).text
    assert "Only the 40 of 60 classes that take part in the most mistakes are shown." in text
    assert "20 more classes" in text
    assert html.count('class="wrong"') == 2
    assert html.count('class="right"') == 38
    assert 'title="c50 taken for c59: 100.0%"' in html
    assert text.index("c50 1 0.0% 0.0% 0.0%") < text.index("c00 1 100.0% 100.0% 100.0%")
    few = render_html(minimal())
    assert "Only the" not in Page(few).text
    assert few.count('class="wrong"') == few.count('class="right"') == 2


def thumbnails(html: str) -> list[Image.Image]:
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]


def test_mistakes_are_shown_small_upright_and_by_name_otherwise(
    encode: Callable[..., bytes], photos: dict[str, Any]
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    rocket = photos["rocket"]  # 427 x 640
    contents = {
        "photo": encode(rocket),
        "turned": encode(rocket, exif=turned),
        "png": encode(Image.fromarray(rocket).convert("RGBA").quantize(), "PNG"),
        "cmyk": encode(Image.fromarray(rocket).convert("CMYK")),
        "gray": encode(Image.fromarray(rocket).convert("L"), "BMP"),
        "truncated": encode(rocket)[:500],
        "text": b"hello",
        "tiny": encode(rocket[:3, :2], "PNG"),
    }

    def read(path: str) -> bytes:
        if path == "gone":
            raise FileNotFoundError(path)
        return contents[path]

    paths = [*contents, "gone"]
    html = render_html(minimal(mistakes=[(path, "roses", "daisy", 0.8) for path in paths], read_image=read))
    images = thumbnails(html)
    assert [image.format for image in images] == ["JPEG"] * 6
    assert [image.size for image in images] == [(160, 107), (107, 160), *[(160, 107)] * 3, (2, 3)]
    assert html.count("no preview") == 3
    text = Page(html).text
    assert all(f"roses taken for daisy , 80.0% {path}" in text for path in paths)
    colour = np.asarray(images[0].convert("RGB"), float).mean(axis=(0, 1))
    np.testing.assert_allclose(colour, rocket.mean(axis=(0, 1)), atol=4)


def test_at_most_24_mistakes_are_shown(encode: Callable[..., bytes], photos: dict[str, Any]) -> None:
    content = encode(photos["coffee"])
    mistakes = [(f"{index}.jpg", "roses", "daisy", 0.8) for index in range(30)]
    html = render_html(minimal(mistakes=mistakes, read_image=lambda _: content))
    assert len(thumbnails(html)) == 24
    assert "23.jpg" in html
    assert "24.jpg" not in html


def test_duplicates_are_listed_with_what_is_wrong_about_them() -> None:
    group = [("a/3.jpg", "a", "train"), ("b/4.jpg", "b", "test")]
    contradictory = [("a/5.jpg", "a", "train"), ("b/6.jpg", "b", "train")]
    across = [("a/7.jpg", "a", "train"), ("a/8.jpg", "a", "test")]
    data = minimal(duplicates=[group, contradictory, across, *[across] * 20])
    text = Page(render_html(data)).text
    assert "The same image more than once: 23 22 in more than one split" in text
    assert "2 with more than one label." in text
    assert "a/3.jpg (a, train) = b/4.jpg (b, test)" in text
    assert "and 3 more." in text
    assert (
        "- the same image in more than one split: 22; with more than one label: 2 (see dup"
        in render_report(data)
    )
    assert "more than one" not in render_report(minimal())
    assert "more than once" not in render_html(minimal())


def test_the_first_skipped_files_are_listed() -> None:
    skipped = [(f"{index:02}.txt", "not an image") for index in range(25)]
    text = Page(render_html(minimal(skipped=skipped))).text
    assert "Files skipped: 25 00.txt not an image" in text
    assert "19.txt" in text
    assert "20.txt" not in text
    assert "and 5 more." in text


def test_stages_and_timings() -> None:
    text = Page(render_html(minimal(stages=STAGES, timings={"features": 3.21, "total": 3725.0}))).text
    assert "head none 12,810 (0.4%) 3,426,890 3 done –" in text
    assert "features 3.2 s total 1 h 02 min" in text


def test_weights_are_said_in_short_and_in_full() -> None:
    html = render_html(minimal(weights="lite from lite.h5\n\nstem <1>  loaded\nhead  new"))
    assert "<summary>lite from lite.h5</summary>\n<pre>\nstem &lt;1&gt;  loaded\nhead  new</pre>" in html
    assert "Weights" not in render_html(minimal())


def test_one_split_needs_no_table_of_splits() -> None:
    test = minimal().evaluations["test"]
    assert "Splits" in Page(render_html(minimal())).text
    assert "Splits" not in Page(render_html(minimal(evaluations={"test": test}))).text


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The figure's curves, in pixels."""
    paths = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke: #', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def test_curves_go_on_from_stage_to_stage() -> None:
    figures = learning_curves(HISTORY)
    assert list(figures) == ["Loss", "Accuracy on validation", "Learning rate"]
    training, validation = points(figures["Loss"])
    assert (len(training), len(validation)) == (6, 8)  # no training loss before a stage's first step
    x = np.array([x for x, _ in validation])
    np.testing.assert_allclose(np.diff(x) / (x[1] - x[0]), [1, 1, 1, 0, 1, 1, 1], atol=1e-3)
    assert validation[0][1] < validation[3][1]  # pixels are counted from the top, and the loss falls
    assert figures["Loss"].count("stroke-dasharray") == 1
    one_stage = learning_curves(HISTORY[:4])
    assert one_stage["Loss"].count("stroke-dasharray") == 0


def test_curves_of_what_was_not_measured_are_left_out() -> None:
    rates = [{"stage": "head", "epoch": epoch, "learning_rate": 0.1, "loss": None} for epoch in (0, 1)]
    assert list(learning_curves(rates)) == ["Learning rate"]
    assert learning_curves([]) == {}


def test_the_reliability_diagram_has_both_or_one() -> None:
    before, after = (judged([0, 0, 1], [0, 0, 0], 3, score) for score in (0.9, 0.7))
    both, one = reliability_diagram(before, after), reliability_diagram(before, None)
    assert "as trained" in both
    assert "with temperature" in both
    assert "with temperature" not in one
    assert both.count("currentColor") > 10


def test_the_same_data_give_the_same_page_everywhere_without_global_state(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    data = minimal(history=HISTORY, stages=STAGES)
    write_report_html(tmp_path / "one.html", data)
    write_report_html(tmp_path / "two.html", data)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, hashlib\nfrom graftserve.training.figures import learning_curves\n"
        f"svg = ''.join(learning_curves({list(HISTORY)!r}).values())\n"
        "print(hashlib.sha256(svg.encode()).hexdigest(), 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = hashlib.sha256("".join(learning_curves(HISTORY).values()).encode()).hexdigest()
    assert done.stdout.split() == [here, "False"]


def test_a_users_own_matplotlib_settings_change_nothing() -> None:
    expected = learning_curves(HISTORY)
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert learning_curves(HISTORY) == expected


def test_the_short_report() -> None:
    tempered = judged([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], 3, 0.6)
    data = minimal(
        temperature=1.5,
        calibrated=tempered,
        stages=STAGES,
        skipped=[("x", "y")],
        notes=["careful"],
        timings={"total": 3.2},
    )
    result = data.evaluations["test"]
    assert result is not None
    low, high = result.accuracy_interval
    lines = render_report(data).splitlines()
    assert lines[0] == "# lite on flowers"
    assert f"| test | 5 | 0.6000 | {low:.4f} to {high:.4f} | {result.log_loss:.4f} |" in lines
    assert "Calibration error on test: 0.2000, and 0.0000 at temperature 1.500. Macro F1: 0.5833." in lines
    assert "| class | train | validation | test | recall on test | precision on test |" in lines
    assert "| daisy | 8 | 1 | 3 | 0.667 | 0.667 |" in lines
    assert "| tulips | 2 | 0 | 0 | not measured | not measured |" in lines
    assert "- roses taken for daisy: 1" in lines
    assert "- head: 12,810 of 3,426,890 parameters learnt, 3 epochs, done" in lines
    assert "- files skipped: 1 (see skipped.csv)" in lines
    assert "- note: careful" in lines
    assert lines[-2] == "- total: 3.2 s"


def test_the_short_report_escapes_what_would_break_its_tables(full: ReportData) -> None:
    lines = render_report(full).splitlines()
    assert "| a\\|b | 1 | 0 | 2 | 0.500 | 0.500 |" in lines
    assert not [line for line in lines if re.search(r"(?<!\\)<", line)]
    empty = render_report(minimal(evaluations={"train": None, "validation": None, "test": None}))
    assert "| test | 0 | not measured | not measured | not measured |" in empty
    assert "| daisy | 8 | 1 | 3 |" in empty
