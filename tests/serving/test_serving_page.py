"""The page in a real browser, on the real server with real models."""

import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from graftserve.client.wire import ModelServerConfig, ReloadConfigRequest, ReloadConfigResponse
from graftserve.client.wire.methods import HANDLE_RELOAD_CONFIG_REQUEST
from graftserve.serving.app import Server
from graftserve.serving.flags import Options
from graftserve.serving.page import (
    CONTENT_SECURITY_POLICY,
    PAGE,
    ModelOverview,
    Overview,
    ServerOverview,
    VersionOverview,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

HOSTILE = "<img src=x onerror=alert(1)>'\"&"
TIMEOUT_S = 15.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        # Where everything is tested, nothing is left out unseen.
        report = pytest.fail if os.environ.get("CI") else pytest.skip
        report("needs Chromium: found no chromium on the PATH")
    flags = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update",
             "disable-sync", "no-first-run")  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[f"--{flag}" for flag in flags], timeout=TIMEOUT_S * 1e3
        )
        expect.set_options(timeout=TIMEOUT_S * 1e3)
        yield browser
        browser.close()


@pytest.fixture
def tolerated() -> list[str]:
    """Patterns of complaints that a test provokes."""
    return []


@pytest.fixture
def open_page(
    browser: Browser, start_server: Callable[..., Server], tolerated: list[str]
) -> Iterator[Callable[..., Page]]:
    """open_page(url, **options of a context) opens the page and waits for its models.

    Pages are closed before servers. The test fails if the console or the browser complained of anything that
    is not tolerated.
    """
    contexts, complaints = [], []

    def open_page(url: str, **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT_S * 1e3)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        audits = page.context.new_cdp_session(page)  # fields without labels, and what the policy blocks
        audits.on("Audits.issueAdded", lambda event: complaints.append(json.dumps(event)))
        audits.send("Audits.enable")
        page.goto(url)
        expect(page.locator("#pill")).to_have_text("live")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in complaints if not any(re.search(known, text) for known in tolerated)] == []


@pytest.fixture
def page(open_page: Callable[..., Page], server: Server) -> Page:
    return open_page(address(server))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel that tells whether an image is red, green or blue, by the mean of each channel."""
    import tensorflow as tf

    names = tf.constant(["red", "green", "blue"])
    images = [tf.TensorSpec([None], tf.string, name="image_bytes")]

    def means(data: Any) -> Any:
        return tf.reduce_mean(
            tf.cast(tf.io.decode_image(data, 3, expand_animations=False), tf.float32), [0, 1]
        )

    class Colours(tf.Module):
        @tf.function(input_signature=images)
        def serve(self, image_bytes: Any) -> dict[str, Any]:
            valid = tf.io.is_jpeg(image_bytes)
            rows = tf.map_fn(
                lambda row: tf.cond(row[1], lambda: means(row[0]), lambda: tf.zeros(3)),
                (image_bytes, valid),
                fn_output_signature=tf.TensorSpec([3], tf.float32),
            )
            probabilities = rows / tf.maximum(tf.reduce_sum(rows, 1, keepdims=True), 1)
            scores, indices = tf.math.top_k(probabilities, 3)
            return {
                "classes": tf.gather(names, indices),
                "scores": scores,
                "probabilities": probabilities,
                "valid": valid,
            }

        @tf.function(input_signature=images)
        def strict(self, image_bytes: Any) -> dict[str, Any]:
            rows = tf.map_fn(means, image_bytes, fn_output_signature=tf.TensorSpec([3], tf.float32))
            return {"logits": tf.concat([-rows, rows, 3 * rows, tf.fill([tf.shape(rows)[0], 3], np.nan)], 1)}

        @tf.function(input_signature=images)
        def facts(self, image_bytes: Any) -> dict[str, Any]:
            length = tf.strings.length(image_bytes)
            return {
                "hash": tf.zeros_like(length, tf.int64) + (2**62 + 1),
                "note": tf.fill(tf.shape(length), "<b>"),
            }

        @tf.function(input_signature=[tf.TensorSpec([], tf.string, name="image")])
        def single(self, image: Any) -> dict[str, Any]:
            return {"length": tf.strings.length(image)}

    root = tmp_path_factory.mktemp("colours")
    module = Colours()
    signatures = {"serving_default": module.serve, "strict": module.strict, "facts": module.facts}
    signatures["single"] = module.single
    tf.saved_model.save(module, str(root / "good"), signatures=signatures)
    return root / "good"


@pytest.fixture(scope="module")
def server(
    colours: Path,
    saved_models: Path,
    base_options: Mapping[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Three models: `colours` with versions 4 and 7 and a broken 9, `half` without images, one hostile."""
    root = tmp_path_factory.mktemp("models")
    for version in ("4", "7"):
        shutil.copytree(colours, root / "colours" / version)
    (root / "colours" / "9").mkdir()
    (root / "colours" / "9" / "saved_model.pb").write_bytes(b"broken")
    shutil.copytree(saved_models / "half_plus_two", root / "half" / "1")
    shutil.copytree(colours, root / "hostile" / "1")
    entries = [
        f'name: "colours" base_path: "{root}/colours" model_version_policy {{ all {{}} }} '
        'version_labels { key: "stable" value: 4 } version_labels { key: "<i>next</i>" value: 7 }',
        f'name: "half" base_path: "{root}/half"',
        f'name: {json.dumps(HOSTILE)} base_path: "{root}/hostile"',
    ]
    listed = "".join(f"config {{ {entry} model_platform: 'tensorflow' }}\n" for entry in entries)
    file = root / "models.config"
    file.write_text(f"model_config_list {{ {listed} }}")
    server = Server(
        Options(
            model_config_file=str(file),
            max_num_load_retries=0,
            allow_version_labels_for_unavailable_models=True,
            max_message_bytes=100_000,
            **base_options,
        )
    )
    server.start()
    yield server
    server.stop(0)


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.rest_port}/"


def get(server: Server, path: str, body: bytes | None = None) -> bytes:
    """What the server answers, failures too. A body makes it a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=TIMEOUT_S)
    connection.request("GET" if body is None else "POST", path, body)
    answer = connection.getresponse().read()
    connection.close()
    return answer


def picture(file: Path, colour: tuple[int, int, int], side_px: int = 64) -> Path:
    Image.new("RGB", (side_px, side_px), colour).save(file)
    return file


def card(page: Page, name: str) -> Locator:
    return page.get_by_role("article").filter(has=page.get_by_role("heading", name=name, exact=True))


def drop(on: Locator, *files: Path) -> None:
    """Drag files over the middle of an element and let them go, as the browser itself sees it."""
    on.scroll_into_view_if_needed()
    box = on.bounding_box()
    assert box is not None
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
    session = on.page.context.new_cdp_session(on.page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": data})
    session.detach()


def results(model: Locator, count: int) -> list[dict[str, Any]]:
    """The results of a model once there are `count` and all are done, newest first."""
    items = model.locator(".results > li")
    expect(items).to_have_count(count)
    expect(model.locator(".busy")).to_have_count(0)
    found: list[dict[str, Any]] = items.evaluate_all(
        """items => items.map(item => ({
            name: item.querySelector('.name').textContent,
            meta: item.querySelector('.meta').textContent,
            note: item.querySelector('.note')?.textContent ?? null,
            outputs: [...item.querySelectorAll('.output')].map(output => output.textContent),
            texts: [...item.querySelectorAll('.output + pre')].map(pre => pre.textContent),
            bars: [...item.querySelectorAll('.bars li')].map(bar => [
                ...[...bar.querySelectorAll('span')].map(span => span.textContent),
                bar.querySelector('i').getBoundingClientRect().width / bar.getBoundingClientRect().width]),
        }))"""
    )
    return found


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in self.contents:
            self.contents[self._inside].append(data)
            self._inside = ""


def test_the_page_is_one_file_that_fits_its_policy() -> None:
    parser = _Elements()
    parser.feed(PAGE.decode())
    addresses = {value for _, name, value in parser.attributes if name in ("src", "href")}
    assert {address for address in addresses if not address.startswith("data:")} == {"overview.json"}
    assert [item for item in parser.attributes if item[1] == "style" or item[1].startswith("on")] == []
    for element, contents in parser.contents.items():
        (content,) = contents
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in CONTENT_SECURITY_POLICY
        assert "url(" not in content
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "http" not in CONTENT_SECURITY_POLICY
    assert "innerHTML" not in PAGE.decode()


def test_the_overview_has_the_shape_that_is_promised(server: Server) -> None:
    overview = json.loads(get(server, "/overview.json"))
    assert overview.keys() == Overview.__annotations__.keys()
    assert overview["server"].keys() == ServerOverview.__annotations__.keys()
    model = next(model for model in overview["models"] if model["name"] == "colours")
    assert model.keys() == ModelOverview.__annotations__.keys()
    assert all(version.keys() == VersionOverview.__annotations__.keys() for version in model["versions"])
    signatures = {signature["name"]: signature for signature in model["image_signatures"]}
    assert signatures.keys() == {"serving_default", "strict", "facts", "single"}
    assert signatures["serving_default"]["outputs"] == ["classes", "probabilities", "scores", "valid"]
    assert signatures["single"]["scalar"] is True
    assert model["labels"] == {"stable": "4", "<i>next</i>": "7"}


def test_models_versions_states_labels_and_engines(page: Page) -> None:
    rows = card(page, "colours").locator("tbody tr")
    cells = rows.evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => "
        "[...cell.querySelectorAll('.tag')].map(tag => tag.textContent).join('|') || cell.textContent))"
    )
    (failure,) = cells.pop(1)
    assert cells == [
        ["9", "END", "", ""],
        ["7", "AVAILABLE", "unnamed requests|<i>next</i>", "tensorflow"],
        ["4", "AVAILABLE", "stable", "tensorflow"],
    ]
    assert failure.startswith("Cannot parse file")
    assert "saved_model.pb" in failure
    half = card(page, "half")
    expect(half).to_contain_text("version 1 answers, in tensorflow")
    expect(half).to_contain_text("Nothing to try here")
    expect(half.get_by_role("button")).to_have_count(0)
    expect(page).to_have_title(re.compile(r"graftserve · 127\.0\.0\.1:\d+"))


def test_photographs_on_an_exported_model(
    open_page: Callable[..., Page],
    start_server: Callable[..., Server],
    exported: Any,
    photos: dict[str, Any],
    encode: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    server = start_server(exported.path.parent, model_name="digits", engine="litert")
    page = open_page(address(server))
    digits = card(page, "digits")
    expect(digits.locator(".engine")).to_have_text("litert")
    for name, pixels in photos.items():
        (tmp_path / f"{name}.jpg").write_bytes(encode(pixels))
        (tmp_path / f"{name}.png").write_bytes(encode(pixels, "PNG"))
    files = sorted(tmp_path.iterdir())
    drop(digits.locator(".zone"), *files)
    shown = results(digits, len(files))
    assert [result["name"] for result in shown] == [file.name for file in reversed(files)]
    for result in shown:
        assert result["meta"].startswith("version 1, ")
        assert {name for name, *_ in result["bars"]} < set("0123456789")
        shares = [width for *_, width in result["bars"]]
        assert shares == sorted(shares, reverse=True)
        assert 0.1 < shares[0] <= 1
    for image in digits.locator("img.picture").all():
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


def test_a_hostile_name_stays_text(page: Page, tmp_path: Path) -> None:
    hostile = card(page, HOSTILE)
    expect(hostile.get_by_role("heading", level=2)).to_have_text(HOSTILE)
    drop(hostile.locator(".zone"), picture(tmp_path / "<b>blue.jpg", (0, 0, 255)))
    (result,) = results(hostile, 1)
    assert result["name"] == "<b>blue.jpg"
    assert result["bars"][0][0] == "blue"
    expect(page.locator("img[onerror], h2 *, .name *, .tag *")).to_have_count(0)


def test_dropped_images_show_bars_the_version_and_the_time(page: Page, tmp_path: Path) -> None:
    files = [picture(tmp_path / "sky.jpg", (0, 51, 204)), picture(tmp_path / "fire.jpg", (230, 0, 0))]
    drop(card(page, "colours"), *files)
    fire, sky = results(card(page, "colours"), 2)
    assert [fire["name"], sky["name"]] == ["fire.jpg", "sky.jpg"]
    for result, winner, share in ((fire, "red", 1.0), (sky, "blue", 0.8)):
        assert re.fullmatch(r"version 7, [\d.]+ (ms|s), [\d.]+ (KiB|bytes)", result["meta"])
        (name, text, width), *others = result["bars"]
        assert name == winner
        assert float(text.removesuffix(" %")) == pytest.approx(100 * share, abs=2)
        assert width == pytest.approx(share, abs=0.02)
        assert len(others) == 2
        assert result["outputs"] == []  # probabilities would say it again
    expect(page.get_by_role("status")).to_have_text(re.compile("^fire.jpg: red"))
    page.get_by_role("button", name="Clear the results").click()
    expect(page.locator(".results > li")).to_have_count(0)


def test_the_chosen_version_and_signature_answer(page: Page, tmp_path: Path) -> None:
    colours, file = card(page, "colours"), picture(tmp_path / "green.png", (0, 100, 0))
    colours.get_by_role("combobox", name="Version").select_option("4")
    colours.get_by_role("combobox", name="Signature").select_option("strict")
    drop(colours.locator(".zone"), file)
    (result,) = results(colours, 1)
    assert result["meta"].startswith("version 4, ")
    assert result["outputs"] == ["logits: the 10 largest of 12, by index"]
    # -means, means, three times the means, NaN.
    assert [bar[:2] for bar in result["bars"][:2]] == [["7", "300"], ["4", "100"]]
    assert [bar[2] for bar in result["bars"][:3]] == pytest.approx([1, 1 / 3, 0], abs=0.01)
    assert result["bars"][-1][1] == "NaN"
    colours.get_by_role("combobox", name="Signature").select_option("facts")
    drop(colours.locator(".zone"), file)
    facts = results(colours, 2)[0]
    assert facts["outputs"] == ["hash", "note"]
    assert facts["texts"] == [str(2**62 + 1), "<b>"]
    colours.get_by_role("combobox", name="Signature").select_option("single")
    drop(colours.locator(".zone"), file)
    assert results(colours, 3)[0]["texts"] == [str(file.stat().st_size)]


def test_what_goes_wrong_is_said_in_place(page: Page, tolerated: list[str], tmp_path: Path) -> None:
    tolerated += ["responded with a status of 400", "net::ERR_FILE_NOT_FOUND"]  # the second: of a folder
    colours, text = card(page, "colours"), tmp_path / "text.jpg"
    text.write_bytes(b"not an image")
    (tmp_path / "folder").mkdir()
    drop(colours.locator(".zone"), text)
    assert "valid: false" in results(colours, 1)[0]["note"]
    expect(colours.locator(".frame")).to_have_text("no preview")
    colours.get_by_role("combobox", name="Signature").select_option("strict")
    drop(colours.locator(".zone"), text)
    refused = results(colours, 2)[0]
    assert "Unknown image file format" in refused["note"]
    assert refused["note"].endswith("(HTTP 400)")
    assert refused["bars"] == []
    drop(colours.locator(".zone"), tmp_path / "folder")
    assert "cannot be read" in results(colours, 3)[0]["note"]


def test_files_are_refused_exactly_where_the_server_would(page: Page, server: Server, tmp_path: Path) -> None:
    around = '{"signature_name":"serving_default","inputs":{"image_bytes":[{"b64":""}]}}'
    most = (server.options.max_message_bytes - len(around)) // 4 * 3
    for name, size in (("most", most), ("more", most + 1)):
        (tmp_path / name).write_bytes(bytes(size))
    drop(card(page, "colours"), tmp_path / "most", tmp_path / "more")
    more, fits = results(card(page, "colours"), 2)
    assert "valid: false" in fits["note"]
    assert more["note"].startswith("Not sent: expected a file of at most ")
    assert "version" not in more["meta"]


def test_keyboard_alone_chooses_files(page: Page, tmp_path: Path) -> None:
    page.on("filechooser", lambda chooser: None)  # from here on the browser opens none of its own
    button = card(page, "colours").get_by_role("button", name="Choose images")
    presses = 0
    while not button.evaluate("button => button === document.activeElement"):
        presses += 1
        assert presses < 20
        page.keyboard.press("Tab")
    expect(button).to_have_css("outline-style", "solid")
    with page.expect_file_chooser() as choosing:
        page.keyboard.press("Enter")
    assert choosing.value.is_multiple()
    choosing.value.set_files(picture(tmp_path / "red.jpg", (255, 0, 0)))
    assert results(card(page, "colours"), 1)[0]["bars"][0][0] == "red"


def test_a_picture_is_pasted_on_the_model_last_touched(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    colours = card(page, "colours")
    colours.get_by_role("combobox", name="Signature").select_option("strict")  # the clipboard holds a PNG
    colours.get_by_role("button", name="Choose images").focus()
    expect(colours.locator(".zone")).to_contain_text("or paste")
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(8, 8), context = canvas.getContext("2d");
            context.fillStyle = "#0000c8";
            context.fillRect(0, 0, 8, 8);
            await navigator.clipboard.write([new ClipboardItem({"image/png": canvas.convertToBlob()})]);
        }"""
    )
    page.keyboard.press("ControlOrMeta+v")
    (result,) = results(colours, 1)
    assert result["bars"][0][:2] == ["8", "600"]
    page.evaluate("navigator.clipboard.writeText('words')")
    page.keyboard.press("ControlOrMeta+v")
    expect(colours.locator(".try > .note")).to_contain_text("found none")


def test_traffic_comes_from_the_difference_of_polls(page: Page, server: Server) -> None:
    half = card(page, "half")
    rate, latency = half.locator(".chart").all()
    expect(rate.locator(".now")).to_have_text(re.compile("^0"))
    expect(latency.locator(".now")).to_have_text(re.compile("^–"))
    for body in [b'{"instances": [1]}'] * 20 + [b'{"instances": ["a"]}']:
        get(server, "/v1/models/half:predict", body)
    expect(rate.locator(".caption")).to_have_text(re.compile(r"^peak [\d.]+, last \d+ s$"))
    expect(latency.locator(".now")).to_have_text(re.compile(r"^[\d.]+ ms"))
    caption = latency.locator(".caption").text_content()
    assert re.fullmatch(r"p50\s[\d.]+\sms · p95\s[\d.]+\sms · p99\s[\d.]+\sms", caption or "")
    total = "21 requests since the start, 1 error"
    expect(half.locator(".total")).to_have_text(re.compile(rf"^{total} \(1 in the last \d+ s\)$"))
    assert rate.locator(".line").evaluate("line => line.getTotalLength()") > 0


def test_rates_and_quantiles_of_a_difference(page: Page) -> None:
    # Each second 10 requests up to 1 s, 80 more up to 2 s, 5 more up to 4 s, 5 beyond all limits; 3 of the
    # 100 fail.
    points, total = page.evaluate(
        """() => {
            const history = makeHistory();
            for (let n = 1; n < 8; n++) history.add({ started_at: "today", uptime_s: 40 + n }, {
                requests: 100 * n, errors: 3 * n, latency_sum_s: 160 * n,
                latency_buckets: [[1, 10 * n], [2, 90 * n], [4, 95 * n]],
            });
            return [history.points(), history.total()];
        }"""
    )
    expected = {"rate": 100, "mean_s": 1.6, "p50_s": 1.5, "p95_s": 4, "p99_s": 4}
    assert total == {**expected, "failed": 18}
    assert [points[-1][name] for name in expected] == list(expected.values())
    assert points[-1]["errors"] == 21
    assert page.evaluate("quantile([], [[1, 110], [2, 190]], 190, 0.25)") == pytest.approx(47.5 / 110)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_everybody(
    open_page: Callable[..., Page], server: Server, scheme: str, tmp_path: Path
) -> None:
    page = open_page(address(server), color_scheme=scheme)
    (tmp_path / "text").write_bytes(b"not an image")
    drop(card(page, HOSTILE), picture(tmp_path / f"{'long' * 50}.jpg", (9, 9, 9)), tmp_path / "text")
    results(card(page, HOSTILE), 2)
    for width_px in (1280, 375):
        page.set_viewport_size({"width": width_px, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(ground) > 200) is (scheme == "light")
    assert (max(ground) < 50) is (scheme == "dark")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_it_asks_less_often_while_hidden(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page(address(server))
    page.evaluate("clearTimeout(timer)")
    page.clock.install()
    asked = []
    page.on("request", lambda request: asked.append(request.url))

    def polls_within(ms: int) -> int:
        asked.clear()
        page.clock.run_for(ms)
        page.wait_for_function("() => polling === null")
        return len(asked)

    def hide(hidden: bool) -> None:
        page.evaluate(
            """hidden => {
                Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )
        page.wait_for_function("() => polling === null")

    hide(False)  # asks at once
    page.clock.pause_at(page.evaluate("Date.now() / 1000") + 60)  # far enough not to be past by then
    page.wait_for_function("() => polling === null")
    assert polls_within(1000) == 1
    hide(True)
    assert polls_within(1000) == 1  # the one that was due
    assert polls_within(14_000) == 0
    assert polls_within(1000) == 1
    hide(False)
    assert polls_within(1000) == 1


def test_a_server_without_models(
    open_page: Callable[..., Page], start_server: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "models.config").write_text("model_config_list {}")
    page = open_page(address(start_server(None, model_config_file=str(tmp_path / "models.config"))))
    expect(page.get_by_role("article")).to_have_text(re.compile("^No model is configured"))
    assert Axe().run(page).violations_count == 0


def test_the_server_goes_away_and_comes_back(
    open_page: Callable[..., Page],
    start_server: Callable[..., Server],
    colours: Path,
    tolerated: list[str],
    tmp_path: Path,
) -> None:
    tolerated.append("net::ERR_")
    file = picture(tmp_path / "red.jpg", (255, 0, 0))
    shutil.copytree(colours, tmp_path / "models" / "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(tmp_path / "models", model_name="m", rest_api_port=port)
    page = open_page(address(server))
    model = card(page, "m")
    drop(model, file)
    results(model, 1)
    server.stop(0)
    expect(page.get_by_role("alert")).to_have_text(re.compile("^The server does not answer since "))
    expect(page.locator("#pill")).to_have_text("no answer")
    drop(model, file)
    assert results(model, 2)[0]["note"].startswith("Expected an answer, got none")
    start_server(tmp_path / "models", model_name="m", rest_api_port=port)
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text("The server answers again.")
    expect(model.locator(".total")).to_have_text(re.compile("^0 requests"))
    drop(model, file)
    assert results(model, 3)[0]["bars"][0][0] == "red"


@pytest.mark.slow
def test_versions_and_models_come_and_go(
    open_page: Callable[..., Page],
    start_server: Callable[..., Server],
    channel_to: Callable[[Server], grpc.Channel],
    colours: Path,
    tolerated: list[str],
    tmp_path: Path,
) -> None:
    tolerated.append("responded with a status of 404")
    shutil.copytree(colours, tmp_path / "models" / "1")
    server = start_server(tmp_path / "models", model_name="m")
    page = open_page(address(server))
    page.evaluate("async () => { await polling; clearTimeout(timer); }")  # it knows no more than now
    shutil.copytree(colours, tmp_path / "models" / "temp")
    (tmp_path / "models" / "temp").rename(tmp_path / "models" / "2")
    give_up_s = time.monotonic() + TIMEOUT_S
    while server.manager.is_available("m", 1):
        assert time.monotonic() < give_up_s
        page.wait_for_timeout(50)
    model = card(page, "m")
    expect(model).to_contain_text("version 1 answers")
    drop(model, picture(tmp_path / "green.jpg", (0, 200, 0)))
    (result,) = results(model, 1)
    assert result["meta"].startswith("version 2, ")
    assert result["bars"][0][0] == "green"
    expect(model).to_contain_text("version 2 answers, in tensorflow")
    expect(model.get_by_text("1 ended version")).to_be_visible()
    nothing = ReloadConfigRequest(config=ModelServerConfig(model_config_list={}))
    reload = channel_to(server).unary_unary(
        HANDLE_RELOAD_CONFIG_REQUEST.path,
        ReloadConfigRequest.SerializeToString,
        ReloadConfigResponse.FromString,
    )
    reload(nothing, timeout=TIMEOUT_S)
    expect(model).to_contain_text("No version is served any more.")
    expect(model).to_contain_text("Nothing to try: no version is AVAILABLE.")
    expect(model.get_by_text("2 ended versions")).to_be_visible()
    expect(model.locator(".results > li")).to_have_count(1)
