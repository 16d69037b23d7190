"""The Python of docs/howto/ runs, against FakeServer; test_docs_blocks.py reads the rest."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from graftserve.client import TensorSpec
from graftserve.client.testing import FakeModel, FakeServer, FakeSignature

_PAGES = Path(__file__).parents[1] / "docs/howto"


def _python(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (_PAGES / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer("flowers", answer=lambda image: None if image == b"no image" else "rose") as server:
        yield server


@pytest.fixture
def run(server: FakeServer) -> Callable[[str], dict[str, Any]]:
    """run(code) -> the names that it made; models:8500 is the server."""

    def run(code: str) -> dict[str, Any]:
        assert '"models:8500"' in code
        names: dict[str, Any] = {}
        exec(compile(code.replace("models:8500", server.target), "docs/howto", "exec"), names)
        return names

    return run


def test_the_tests_of_a_service_pass(tmp_path: Path) -> None:
    test = tmp_path / "test_sorter.py"
    test.write_text("\n\n".join(_python("test-a-service.md")))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_fastapi(run: Callable[[str], dict[str, Any]], server: FakeServer) -> None:
    pytest.importorskip("fastapi", reason="needs the extra dev")
    httpx = pytest.importorskip("httpx", reason="needs the extra dev")
    (code,) = [code for code in _python("services.md") if "FastAPI" in code]
    app = run(code)["app"]

    async def ask() -> list[Any]:
        async with AsyncExitStack() as stack:
            state = await stack.enter_async_context(app.router.lifespan_context(app))

            async def with_state(scope: Any, receive: Any, send: Any) -> None:
                await app(scope | {"state": dict(state)}, receive, send)

            transport = httpx.ASGITransport(with_state)
            http = await stack.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://service")
            )
            good = await http.post("/classify", content=b"a photo")
            bad = await http.post("/classify", content=b"no image")
            server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, times=None)
            refused = await http.post("/classify", content=b"a photo")
            server.heal()
            with server.holding():
                late = await http.post("/classify", content=b"a photo")
            return [good, bad, refused, late]

    good, bad, refused, late = asyncio.run(ask())
    assert (good.status_code, good.json()) == (200, {"label": "rose", "score": 1.0})
    assert bad.status_code == 422
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert late.status_code == 504


def test_asyncio(
    run: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(b"a photo")
    (code,) = [code for code in _python("services.md") if "asyncio.run" in code]
    run(code)
    assert capsys.readouterr().out == "['rose']\n"


def test_a_model_of_any_signature(capsys: pytest.CaptureFixture[str]) -> None:
    rows = TensorSpec("float32", (None, 4))
    signature = FakeSignature({"x": rows}, {"y": rows}, lambda inputs: {"y": inputs["x"] + 1})
    (code,) = _python("own-model.md")
    with FakeServer(FakeModel("mine", signatures={"serving_default": signature})) as server:
        names: dict[str, Any] = {}
        exec(code.replace("localhost:8500", server.target), names)
    assert names["outputs"]["y"].tolist() == [[1.0] * 4]
    assert "serving_default" in capsys.readouterr().out


def test_what_is_said_to_preprocess_is_understood() -> None:
    pytest.importorskip("tensorflow", reason="needs the extra training")
    from graftserve.export.brought import parse_preprocess

    table = re.findall(
        r"^\| .* \| (?:add )?`([\w=.,-]+)`", (_PAGES / "own-model.md").read_text("utf-8"), re.M
    )
    heading, *values = table
    assert heading == "--preprocess"
    assert len(values) == 7
    for text in values:
        parse_preprocess(
            text if "pixels" in text or "=" not in text else f"pixels=0..1,{text}", 224, Path("m")
        )
