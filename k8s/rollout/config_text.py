"""Change one model of a server's configuration in text format, and leave all else as its author wrote it.

A protocol buffer that is read and printed again has lost its comments and its order. So the text is searched
for the one model's `config { }`, its policy and labels are cut out, and the new ones written before its
closing brace. What comes out is read again: if it does not say what it should, which text format's rarer
spellings may cause, the message is printed instead.

Source: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from google.protobuf import text_format

from graftserve.client.wire import ModelConfig, ModelServerConfig

from .errors import ConfigFileError

__all__ = ["edited", "find_model", "parse_config"]

_CHANGED = ("model_version_policy", "version_labels")
_INDENT = "  "
_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<word>[A-Za-z_]\w*|[-+.0-9][\w.+-]*)|(?P<other>.)""",
    re.DOTALL,
)
_CLOSES = {"{": "}", "<": ">", "[": "]"}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Field:
    """start, end: of all of it in the text. value: its tokens; those inside the braces where it is a message.
    close: where the closing brace is; -1 where there is none."""

    name: str
    start: int
    end: int
    value: Sequence[_Token]
    close: int = -1


class _NotUnderstoodError(Exception):
    """A spelling that this does not read."""


def parse_config(text: str, where: str) -> ModelServerConfig:
    """Read a ModelServerConfig with a list of models. Raises ConfigFileError; where: for its message."""
    config = ModelServerConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise ConfigFileError(f"{where}: expected a ModelServerConfig in text format: {error}") from error
    if config.WhichOneof("config") != "model_config_list":
        raise ConfigFileError(f"{where}: expected a model_config_list, got none")
    return config


def find_model(config: ModelServerConfig, model: str, where: str) -> ModelConfig:
    """The model's own part of `config`. Raises ConfigFileError if it is not there once."""
    found = [entry for entry in config.model_config_list.config if entry.name == model]
    if len(found) != 1:
        names = ", ".join(entry.name for entry in config.model_config_list.config) or "none"
        raise ConfigFileError(f"{where}: expected the model {model} once, got the models {names}")
    return found[0]


def edited(text: str, wanted: ModelServerConfig, model: str) -> str:
    """`text`, in which `model` has the policy and the labels that it has in `wanted`.

    wanted: what the result says; it differs from what `text` says in nothing else.
    """
    try:
        changed = _replaced(text, find_model(wanted, model, "the configuration"))
        if text_format.Parse(changed, ModelServerConfig()) == wanted:
            return changed
    except (_NotUnderstoodError, text_format.ParseError):
        pass
    printed: str = text_format.MessageToString(wanted, as_utf8=True)
    return printed


def _replaced(text: str, entry: ModelConfig) -> str:
    block = _block_of(text, entry.name)
    fields = list(_fields(block.value))
    edits = [(*_whole_lines(text, field), "") for field in fields if field.name in _CHANGED]
    lines = _new_lines(entry)
    line_start = text.rfind("\n", 0, block.close) + 1
    indent = text[line_start : block.close]
    if indent.strip():  # the brace closes on a line with other things
        edits.append((block.close, block.close, f"{' '.join(lines)} "))
    else:
        # As far to the right as its neighbours are, or one step from the brace.
        own = next((field.start for field in fields if _indent_of(text, field.start) is not None), None)
        inner = (None if own is None else _indent_of(text, own)) or indent + _INDENT
        edits.append((line_start, line_start, "".join(f"{inner}{line}\n" for line in lines)))
    for begin, end, new in sorted(edits, reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def _new_lines(entry: ModelConfig) -> list[str]:
    parts = [ModelConfig(model_version_policy=entry.model_version_policy)]
    parts += [ModelConfig(version_labels=dict([pair])) for pair in sorted(entry.version_labels.items())]
    return [text_format.MessageToString(part, as_one_line=True, as_utf8=True).strip() for part in parts]


def _block_of(text: str, model: str) -> _Field:
    for models in _fields(list(_tokens(text))):
        if models.name != "model_config_list" or models.close < 0:
            continue
        for config in _fields(models.value):
            if config.name == "config" and config.close >= 0:
                for field in _fields(config.value):
                    if field.name == "name" and len(field.value) == 1 and field.value[0].text[1:-1] == model:
                        return config
    raise _NotUnderstoodError


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "space":
            yield _Token(match.lastgroup or "", match.group(), match.start(), match.end())


def _fields(tokens: Sequence[_Token]) -> Iterator[_Field]:
    at = 0
    while at < len(tokens):
        name = tokens[at]
        if name.kind != "word":
            raise _NotUnderstoodError
        first = at + 1
        if first < len(tokens) and tokens[first].text == ":":
            first += 1
        if first == len(tokens):
            raise _NotUnderstoodError
        opening = tokens[first].text
        if opening in _CLOSES:
            last = _closing(tokens, first)
            value, close = tokens[first + 1 : last], tokens[last].start if opening != "[" else -1
        else:
            last, close = first, -1
            while tokens[first].kind == "string" and _kind(tokens, last + 1) == "string":
                last += 1  # "one" "string"
            value = tokens[first : last + 1]
        at = last + 1
        if at < len(tokens) and tokens[at].text in (",", ";"):
            last, at = at, at + 1
        yield _Field(name.text, name.start, tokens[last].end, value, close)


def _kind(tokens: Sequence[_Token], at: int) -> str:
    return tokens[at].kind if at < len(tokens) else ""


def _closing(tokens: Sequence[_Token], first: int) -> int:
    expected: list[str] = []
    for at in range(first, len(tokens)):
        if tokens[at].text in _CLOSES:
            expected.append(_CLOSES[tokens[at].text])
        elif expected and tokens[at].text == expected[-1]:
            expected.pop()
            if not expected:
                return at
    raise _NotUnderstoodError


def _indent_of(text: str, at: int) -> str | None:
    """What is before `at` on its line, if that is nothing but blanks."""
    before = text[text.rfind("\n", 0, at) + 1 : at]
    return None if before.strip() else before


def _whole_lines(text: str, field: _Field) -> tuple[int, int]:
    """Where to cut a field out: with its lines, if nothing else is on them."""
    indent = _indent_of(text, field.start)
    line_end = text.find("\n", field.end)
    line_end = len(text) if line_end < 0 else line_end + 1
    if indent is not None and not text[field.end : line_end].strip():
        return field.start - len(indent), line_end
    end = field.end
    while end < len(text) and text[end] in " \t":
        end += 1
    return field.start, end
