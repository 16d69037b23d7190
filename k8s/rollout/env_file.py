"""Lines KEY=VALUE, of which some get other values and all else stays as its author wrote it. Pure.

They mean what Kustomize makes of them: blanks before a key are skipped, an empty line and one that begins
with # say nothing, and a value is everything after the first =, quotes and blanks included.

Source: https://github.com/kubernetes-sigs/kustomize/blob/master/api/kv/kv.go
"""

import re
from collections.abc import Mapping

from .errors import OverlayError

__all__ = ["edited", "parse_env"]

_COMMENT = re.compile(r"\ufeff?\s*(#.*)?")
_PAIR = re.compile(r"(?P<start>\ufeff?\s*(?P<key>[^\s#=][^=]*)=)(?P<value>[^\r]*)(?P<end>\r?)")


def parse_env(text: str, where: str) -> dict[str, str]:
    """The values by key. Raises OverlayError; where: for its message."""
    values: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if _COMMENT.fullmatch(line):
            continue
        pair = _PAIR.fullmatch(line)
        if pair is None:
            raise OverlayError(f"{where}, line {number}: expected KEY=VALUE, got {line.strip()!r}")
        if pair["key"] in values:
            raise OverlayError(f"{where}, line {number}: {pair['key']} is there twice: keep one of them")
        values[pair["key"]] = pair["value"]
    return values


def edited(text: str, changes: Mapping[str, str], where: str) -> str:
    """`text`, in which the keys of `changes` have other values.

    Raises OverlayError if a key is not there once, or a line is none of those that Kustomize reads.
    """
    missing = changes.keys() - parse_env(text, where).keys()
    if missing:
        raise OverlayError(f"{where}: expected a line {min(missing)}=, got none")
    lines = []
    for line in text.split("\n"):
        pair = _PAIR.fullmatch(line)
        if pair is not None and pair["key"] in changes:
            line = f"{pair['start']}{changes[pair['key']]}{pair['end']}"
        lines.append(line)
    return "\n".join(lines)
