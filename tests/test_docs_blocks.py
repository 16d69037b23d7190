"""The code in README.md, CONTRIBUTING.md, docs/ and examples/: every block can be read by what would run it.

Python compiles, and what it imports is there; shell is shell, with commands, options, extras, targets and
files that exist; configuration and queries parse. Nothing that a shell block says is executed. Python runs:
the client's against FakeServer, export's (slow) on a real run; the README's does in test_path.py.
"""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import click
import pytest
from google.protobuf import text_format
from google.protobuf.message import Message

from graftserve.cli.app import cli
from graftserve.cli.runtime import take_runtime
from graftserve.client.wire import ModelServerConfig, SSLConfig
from graftserve.serving.flags import UNUSED, Options, parse_args
from graftserve.training.recipe import Augmentation, Head, PseudoLabels, Recipe, Stage
from graftserve.training.recipe_files import load_recipe, recipe_names
from tests.test_imports import ALLOWED, TENSORFLOW

markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py")

_ROOT = Path(__file__).parents[1]
_DOCUMENTS = [
    *(_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((_ROOT / "docs").rglob("*.md")),
    *sorted((_ROOT / "examples").rglob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A fenced block; line: of its first line, from 1."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def _tokens(path: Path) -> list[Any]:
    tokens: list[Any] = markdown_it.MarkdownIt("commonmark").enable("table").parse(path.read_text("utf-8"))
    return tokens


@cache
def _blocks() -> tuple[Block, ...]:
    return tuple(
        Block(path.relative_to(_ROOT).as_posix(), token.map[0] + 2, token.info.strip(), token.content)
        for path in _DOCUMENTS
        for token in _tokens(path)
        if token.type in ("fence", "code_block")
    )


@cache
def _spans() -> tuple[str, ...]:
    """All that stands between backticks in running text, once each."""
    spans = (
        child.content
        for path in _DOCUMENTS
        for token in _tokens(path)
        for child in token.children or ()
        if child.type == "code_inline"
    )
    return tuple(dict.fromkeys(" ".join(span.split()) for span in spans))


# Shell


def _commands(script: str) -> Iterator[list[str]]:
    """The words of each program that a script starts, without redirections, comments and assignments."""
    script = re.sub(r"\$\([^()]*\)", "SUBSTITUTED", script.replace("\\\n", " "))
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        words = iter(lexer)
        for word in words:
            if word in ("|", "||", "&&", "&", ";", "(", ")"):
                if command:
                    yield command
                command = []
            elif word in ("<", ">", ">>"):
                if command[-1:] == ["2"]:
                    command.pop()
                next(words)
            elif command or not re.match(r"[A-Z_]+=", word):
                command.append(word)
        if command:
            yield command


def _resolve(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """The command that `graftserve WORDS` means, and what is left of them for it to read."""
    command: click.Command = cli
    context = click.Context(cli, info_name="graftserve")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        context = click.Context(found, info_name=name, parent=context)
        command = found
    return command, context, words


def _check_graftserve(words: list[str]) -> None:
    """As the command would read them, up to where it would begin."""
    command, context, rest = _resolve(words)
    if command.name == "serve":
        Options.from_flags(parse_args(take_runtime(rest)[1]))
        return
    read = command.make_context(command.name, rest, parent=context.parent)
    assert read.command is command
    if command.name == "train" and read.params["recipe"] in recipe_names():  # others are the reader's
        load_recipe(read.params["recipe"], "data", read.params["settings"])


def _check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    if words[1] == "-r":
        assert (_ROOT / words[2]).is_file(), words
        return
    for word in words[1:]:
        extras = re.fullmatch(r"graftserve(?:\[([\w,-]+)\])?", word)
        assert extras, word
        known = set(metadata("graftserve").get_all("Provides-Extra") or ())
        assert set(filter(None, (extras[1] or "").split(","))) <= known, word


def _check_make(words: list[str]) -> None:
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        variable = re.match(r"([A-Z_]+)=", word)
        assert re.search(rf"^{variable[1]} \?=" if variable else rf"^{re.escape(word)}:", makefile, re.M), (
            word
        )


def _check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words
    elif words[0] == "-c":
        _check_python_code(words[1])
    else:
        assert "/" not in words[0] or (_ROOT / words[0]).is_file(), words  # without, it is the reader's


def _check_nothing(words: list[str]) -> None:
    """Not ours: that the shell reads it is all that is checked; test_operations.py asks kubectl's help."""


_PROGRAMS: Mapping[str, Callable[[list[str]], None]] = {
    "graftserve": _check_graftserve,
    "pip": _check_pip,
    "make": _check_make,
    "python": _check_python,
    ".venv/bin/python": _check_python,
    **dict.fromkeys(
        [
            "base64",
            "cd",
            "celery",
            "curl",
            "docker",
            "git",
            "gunicorn",
            "head",
            "kind",
            "kubectl",
            "mkdir",
            "mv",
        ],
        _check_nothing,
    ),
    **dict.fromkeys(["openssl", "printf", "tr", "uvicorn"], _check_nothing),
    **dict.fromkeys(["for", "do", "done"], _check_nothing),  # `do` hides the first command of a loop
}

# Files of the repository that a command names; others are the reader's.
_OURS = re.compile(r"(?:k8s|serving|benchmarks|examples|scripts|tests)/[\w./-]+")


def _check_sh(text: str) -> None:
    done = subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise ValueError(done.stderr)
    for program, *words in _commands(text):
        assert program in _PROGRAMS, program
        _PROGRAMS[program](words)
        for word in words:
            path = _OURS.fullmatch(word)
            assert path is None or (_ROOT / word).exists(), word


# Other languages


_NOT_INSTALLED = frozenset({"celery"})  # not worth its dependencies for the names in one block


def _check_python_code(text: str) -> None:
    tree = compile(text, "block", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] in _NOT_INSTALLED:
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):  # a module of it that nobody has imported yet
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def _check_promql(text: str) -> None:
    pytest.importorskip("promql_parser", reason="needs promql-parser").parse(text)


def _check_yaml(text: str) -> None:
    assert list(pytest.importorskip("yaml", reason="needs PyYAML").safe_load_all(text))


def _check_toml(text: str) -> None:
    Recipe.from_dict({"data_dir": "data", **tomllib.loads(text)})


_TEXT_PROTOS: Mapping[str, Callable[[], Message]] = {
    "model_config_list": ModelServerConfig,
    "server_key": SSLConfig,
}


def _check_plain(text: str) -> None:
    """Trees, transcripts and quotations; but a server's configuration can be read."""
    for beginning, message in _TEXT_PROTOS.items():
        if text.startswith(beginning):
            text_format.Parse(text, message())
    assert text.strip()
    assert not re.search(r"^(?:graftserve|kubectl|pip) ", text, re.MULTILINE), (
        "commands belong into a block of sh"
    )


_LANGUAGES: Mapping[str, Callable[[str], Any]] = {
    "": _check_plain,
    "json": json.loads,
    "promql": _check_promql,
    "python": _check_python_code,
    "sh": _check_sh,
    "text": _check_plain,
    "toml": _check_toml,
    "yaml": _check_yaml,
}


@pytest.mark.parametrize("block", _blocks(), ids=str)
def test_a_block_can_be_read(block: Block) -> None:
    assert block.language in _LANGUAGES, f"{block}: no check for blocks of {block.language}"
    _LANGUAGES[block.language](block.text)


def test_blocks_are_found_in_every_document_that_has_some() -> None:
    by_fence = {
        path.relative_to(_ROOT).as_posix(): len(re.findall(r"^ *```", path.read_text("utf-8"), re.M)) // 2
        for path in _DOCUMENTS
    }
    found = dict.fromkeys(by_fence, 0)
    for block in _blocks():
        found[block.document] += 1
    assert found == by_fence


@pytest.mark.parametrize(
    ("language", "text", "error"),
    [
        ("sh", "graftserve trian flowers/ -o runs/a", "trian"),
        ("sh", "graftserve train flowers/ --outptu runs/a", "--outptu"),
        ("sh", "graftserve train flowers/", "output"),
        ("sh", "graftserve rollout start \\\n  --wieght 5", "--wieght"),
        ("sh", "git x | graftserve classify --model flowers", "images"),
        ("sh", "A=1 graftserve serve --model_base_path=m --prot 1", "--prot"),
        ("sh", "graftserve serve --port 1", "--model_base_path"),
        ("sh", "graftserve train 'flowers/", "quot"),
        ("sh", "pip install 'graftserve[trainign]'", "trainign"),
        ("sh", "make dmeo", "dmeo"),
        ("sh", "kubectl apply -k k8s/overlays/nowhere", "nowhere"),
        ("sh", "sudo reboot", "sudo"),
        ("python", "from graftserve.client import Cleint", "Cleint"),
        ("python", "with Client() as client\n    pass", ":"),
        ("promql", "sum by (", "parenthesis"),
        ("json", "{a: 1}", "quotes"),
        ("toml", "a = ", "Invalid value"),
        ("toml", "[head]\nhiden = [256]", "hiden"),
        ("sh", "graftserve train flowers/ -o r --recipe slim --set stages.0.epoch=5", "epoch"),
        ("yaml", "a: [1", "expected"),
        ("", "model_config_list { config { nmae: 'x' } }", "nmae"),
        ("text", "graftserve train flowers/", "sh"),
    ],
)
def test_a_wrong_block_is_found(language: str, text: str, error: str) -> None:
    with pytest.raises(Exception, match=re.escape(error)):  # each parser has its own
        _LANGUAGES[language](text)


# Running text


@pytest.mark.parametrize("line", [span for span in _spans() if re.match(r"graftserve [a-z-]", span)])
def test_a_command_in_the_text_is_known(line: str) -> None:
    """Which may leave out what does not matter there, and say several as `a|b`."""
    words = shlex.split(line)[1:]
    chosen = next((word.split("|") for word in words if re.fullmatch(r"[a-z|]+", word) and "|" in word), None)
    for choice in chosen or [""]:
        command, _, rest = _resolve([choice if word.split("|") == chosen else word for word in words])
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= _options(command)


def _options(command: click.Command) -> set[str]:
    """Those of a command, and of all that it groups."""
    found = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for inner in filter(None, (command.get_command(context, n) for n in command.list_commands(context))):
            found |= _options(inner)
    return found


# Of celery, docker, kubectl, pytest, the examples, and of the scripts that the init containers run.
_OPTIONS_OF_OTHERS = frozenset(
    {
        "--build-arg",
        "--cpus",
        "--force-conflicts",
        "--health-cmd",
        "--mutual",
        "--part-rows",
        "--pool",
        "--server-side",
        "--slow",
        "--stop-timeout",
    }
)


# What docs/classic.md translates. Sources: tensorflow/hub, examples/image_retraining/retrain.py and its
# label_image.py; tensorflow/models, research/slim/train_image_classifier.py.
_OPTIONS_OF_CLASSICS = frozenset(
    f"--{name}"
    for name in (
        *("architecture", "bottleneck_dir", "eval_step_interval", "flip_left_right"),
        *("how_many_training_steps", "image_dir", "intermediate_store_frequency", "learning_rate"),
        *("output_graph", "output_labels", "print_misclassified_test_images", "random_brightness"),
        *("random_crop", "random_scale", "saved_model_dir", "summaries_dir", "test_batch_size"),
        *("testing_percentage", "tfhub_module", "train_batch_size", "validation_batch_size"),
        *("validation_percentage", "graph", "input_layer", "input_mean", "labels", "output_layer"),
        *("batch_size", "checkpoint_exclude_scopes", "checkpoint_path", "dataset_dir", "end_learning_rate"),
        *("ignore_missing_vars", "label_smoothing", "labels_offset", "learning_rate_decay_factor"),
        *("learning_rate_decay_type", "max_number_of_steps", "model_name", "momentum"),
        *("moving_average_decay", "num_clones", "num_epochs_per_decay", "opt_epsilon", "optimizer"),
        *("preprocessing_name", "rmsprop_decay", "rmsprop_momentum", "save_interval_secs"),
        *("sync_replicas", "train_dir", "train_image_size", "trainable_scopes", "weight_decay"),
        "worker_replicas",
    )
)


def test_an_option_in_the_text_is_known() -> None:
    known = _options(cli) | _OPTIONS_OF_CLASSICS
    known |= {f"--{name}" for name in UNUSED} | {"--help"} | _OPTIONS_OF_OTHERS
    named = {match[1] for span in _spans() if (match := re.match(r"(--[a-z][\w-]*)", span))}
    assert len(named) > 50
    unknown = named - known
    assert not unknown, "mend the text, or add the option of another program to _OPTIONS_OF_OTHERS"


@pytest.mark.parametrize("line", [span for span in _spans() if re.match(r"make [a-z]", span)])
def test_a_target_in_the_text_is_known(line: str) -> None:
    _check_make(shlex.split(line)[1:])


@pytest.mark.parametrize("line", [span for span in _spans() if span.startswith("pip install ")])
def test_an_extra_in_the_text_is_known(line: str) -> None:
    _check_pip(shlex.split(line)[1:])


_TABLES = {
    "augmentation": Augmentation,
    "head": Head,
    "pseudo_labels": PseudoLabels,
    "stages": Stage,
}


@pytest.mark.parametrize(
    "span", [span for span in _spans() if re.match(rf"(?:{'|'.join(_TABLES)})\.(?!\w+\()", span)]
)
def test_a_setting_in_the_text_is_known(span: str) -> None:
    """`stages.N.epochs`, `head.dropout = 0.5`, or `augmentation.*` for all of a table."""
    table, *_, setting = re.split(r"\s*=", span)[0].split(".")
    assert setting in {"*", *(field.name for field in dataclasses.fields(_TABLES[table]))}


_FOLDERS = "cli|client|export|k8s|serving|training|benchmarks|docs|scripts|tests"


@pytest.mark.parametrize(
    "path", [span for span in _spans() if re.fullmatch(rf"(?:{_FOLDERS})/[\w./-]*", span)]
)
def test_a_path_in_the_text_is_there(path: str) -> None:
    assert (_ROOT / path).exists()


def test_the_map_has_the_arrows_that_are_held() -> None:
    text = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)/` \| .* \| (.*) \|$", text, re.MULTILINE))
    for package, allowed in ALLOWED.items():
        if package == "cli":
            assert rows[package].startswith("all of them")
            assert allowed == set(ALLOWED) - {"cli"}
        elif not allowed:
            assert rows[package] == "nothing of ours"
        else:
            assert set(re.findall(r"`([\w.]+)`", rows[package])) == allowed
    (sentence,) = re.findall(r"Only (.*?) import TensorFlow", text, re.DOTALL)
    named = re.findall(r"`(\w+)`", sentence)
    assert named == ["training", "export", "serving", "loader", "litert"]
    assert {"training", "export", "serving.loader", "serving.litert"} == TENSORFLOW


# Python that runs

# What docs/client.md takes for granted; then each block, with the names that those before it have made, and
# with an open client.
_CLIENT_PROGRAM = """
import ast, asyncio, inspect, io, json, logging, sys
import grpc, numpy as np
from PIL import Image
from graftserve.client import AsyncClient, Client, TensorSpec
from graftserve.client.testing import FakeServer, FakeSignature

blocks, substitutes = json.load(sys.stdin)
buffer = io.BytesIO()
Image.new("RGB", (640, 480), "red").save(buffer, "JPEG")
jpeg = buffer.getvalue()
with open("photo.jpg", "wb") as file:
    file.write(jpeg)
images, paths, array = [jpeg, jpeg], ["photo.jpg", "photo.jpg"], np.ones([1, 2], np.float32)

async def give():
    yield jpeg

source = give()
x = TensorSpec("float32", (None, 2))
double = FakeSignature({"x": x}, {"y": x}, lambda inputs: {"y": 2 * inputs["x"]})
with FakeServer("flowers") as server:
    server.model.signatures["double"] = double
    for name, text in blocks:
        for old, new in substitutes.items():
            text = text.replace(old, new.replace("TARGET", server.target))
        code = compile(text, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        with Client(server.target, "flowers") as client:
            result = eval(code, globals())
            if inspect.iscoroutine(result):
                asyncio.run(result)
        print(name)
print(len(results), vectors.shape, outputs["y"].tolist(), prediction.label in server.model.classes)
"""

_CLIENT_SUBSTITUTES = {
    '"dns:///flowers:8500"': '"TARGET"',
    '"flowers:8500"': '"TARGET"',
    '"models:8500"': '"TARGET"',
    'predict({"x": array})': 'predict({"x": array}, signature="double")',
    "start_http_server(9100)": "start_http_server(0)",
}


def test_the_code_of_the_clients_page_runs(tmp_path: Path) -> None:
    for module in ("opentelemetry.exporter.otlp.proto.grpc", "prometheus_client"):
        pytest.importorskip(module)
    blocks = [
        (str(block), block.text)
        for block in _blocks()
        if (block.document, block.language) == ("docs/client.md", "python")
    ]
    assert len(blocks) > 5
    for old in _CLIENT_SUBSTITUTES:
        assert any(old in text for _, text in blocks), f"{old} is said nowhere any more"
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT_PROGRAM],
        input=json.dumps([blocks, _CLIENT_SUBSTITUTES]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*(name for name, _ in blocks), "2 (2, 8) [[2.0, 2.0]] True"]


@pytest.mark.slow
def test_the_code_of_the_exports_page_runs(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (
        block for block in _blocks() if (block.document, block.language) == ("docs/export.md", "python")
    )
    assert "require_accuracy=0.9" in block.text
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/flowers").symlink_to(trained.path)
    monkeypatch.chdir(tmp_path)
    text = block.text.replace("require_accuracy=0.9", "require_accuracy=0.1")  # 200 digits teach little
    exec(compile(text, str(block), "exec"), {})
    version, difference = capsys.readouterr().out.split()
    assert version == "1"
    assert 0 <= float(difference) < 1e-3
    assert (tmp_path / "models/flowers/1/saved_model.pb").is_file()
