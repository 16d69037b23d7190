"""docs/tutorial.md, walked: its commands in their order, in an empty folder, and what they print.

A block without a language is what the command above it prints, line by line: `...` stands for anything, and
alone in its line for any lines. Where a quoted line has a number with a point in it, its numbers are those of
one machine, and any others will do. Blank lines and the width of gaps do not matter.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

_TUTORIAL = Path(__file__).parents[1] / "docs/tutorial.md"
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_COMMAND_TIMEOUT_S = 300


class Block(NamedTuple):
    line: int
    language: str
    text: str


def _blocks() -> list[Block]:
    document = _TUTORIAL.read_text(encoding="utf-8")
    return [
        Block(document.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    ]


def _is_quoted(quoted: str, printed: str) -> bool:
    """Whether a line was printed as it is quoted."""
    has_point = re.search(r"\d\.\d", quoted) is not None
    pattern = ""
    for part in re.split(rf"(\.\.\.|{_NUMBER}|\s+)", quoted):
        if part == "...":
            pattern += ".*"
        elif has_point and re.fullmatch(_NUMBER, part):
            pattern += _NUMBER
        else:
            pattern += r"\s+" if part.isspace() else re.escape(part)
    return re.fullmatch(pattern, printed.strip()) is not None


def _missing(quotation: str, printed: str) -> str | None:
    """The first line of `quotation` that is not printed in its place, or None."""
    lines = iter([line for line in printed.splitlines() if line.strip()])
    may_skip = True  # what is printed before the first line, progress as a rule
    for quoted in filter(None, map(str.strip, quotation.splitlines())):
        if quoted == "...":
            may_skip = True
            continue
        found = (line for line in lines if _is_quoted(quoted, line)) if may_skip else lines
        line = next(found, None)
        if line is None or not _is_quoted(quoted, line):
            return quoted
        may_skip = False
    return None


@pytest.mark.parametrize(
    ("quotation", "printed", "missing"),
    [
        ("a 1\nb", "progress\na   1\n\nb\n", None),
        ("a 1", "a 2", "a 1"),
        ("a 0.5 of 3, 2e-7", "a 0.75 of 4, 1.5e-06", None),
        ("a 0.5 of 3", "b 0.5 of 3", "a 0.5 of 3"),
        ("a\nc", "a\nb\nc", "c"),
        ("a\n...\nc", "a\nb\nc", None),
        ("a, ...: c", "a, b: c", None),
        ("a.c", "abc", "a.c"),
    ],
)
def test_how_quotations_are_read(quotation: str, printed: str, missing: str | None) -> None:
    assert _missing(quotation, printed) == missing


class Walk:
    """The reader's two terminals. `ports`: what stands for the tutorial's 8500 and 8501."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {"8500": _free_port(), "8501": _free_port()}
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        home = folder / "home"
        home.mkdir()
        self._environment = os.environ | {"HOME": str(home), "PATH": binaries}
        self._server: subprocess.Popen[str] | None = None
        self._server_log: list[str] = []
        self._ready = threading.Event()

    def run(self, block: Block) -> str:
        """What a block of sh or Python prints."""
        text = block.text
        for port, free in self._ports.items():
            text = re.sub(rf"(localhost:|port ){port}", rf"\g<1>{free}", text)
        if block.language == "python":
            (self._folder / "ask.py").write_text(text)
            return self._bash("python ask.py")
        if text.startswith("graftserve serve "):
            return self._serve(text)
        target = f"--target localhost:{self._ports['8500']}"
        return self._bash(re.sub(r"graftserve (rollout \w+|status|classify)", rf"\g<0> {target}", text))

    def shown(self, printed: str) -> str:
        """With the tutorial's ports."""
        for port, free in self._ports.items():
            printed = printed.replace(f":{free}", f":{port}")
        return printed

    def end(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            assert self._server.wait(60) == 0
            self._reader.join()

    def _bash(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )
        promised = re.search(r"# ends with status (\d)$", text, re.MULTILINE)
        assert done.returncode == int(promised[1] if promised else 0), f"{text}\n{done.stdout}"
        return done.stdout

    def _serve(self, text: str) -> str:
        self._server = subprocess.Popen(
            shlex.split(text.replace("\\\n", " ")),
            cwd=self._folder,
            env=self._environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        assert self._ready.wait(120), self._server_log
        assert self._server.poll() is None, self._server_log
        return "\n".join(self._server_log)

    def _read_log(self) -> None:
        assert self._server is not None
        assert self._server.stderr is not None
        with self._server.stderr as lines:
            for line in lines:
                self._server_log.append(line.rstrip())
                if line.startswith("ready: "):
                    self._ready.set()
        self._ready.set()


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    walk = Walk(tmp_path)
    yield walk
    walk.end()


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_can_be_walked(walk: Walk, tmp_path: Path) -> None:
    printed = ""
    quoted = 0
    for block in _blocks():
        if block.language in ("sh", "python"):
            if not block.text.startswith("pip install"):
                printed = walk.run(block)
        elif block.text.startswith("model_config_list"):
            (tmp_path / "models.config").write_text(block.text)
        else:
            missing = _missing(block.text, walk.shown(printed))
            assert missing is None, f"docs/tutorial.md:{block.line}: expected {missing!r} in\n{printed}"
            quoted += 1
    assert quoted >= 10
    assert {path.name for path in (tmp_path / "models/digits").iterdir()} >= {"1", "2"}
    assert (tmp_path / "comparison.html").is_file()
