"""Classify every image of a folder, or of a list, that is not classified yet.

    python classify_folder.py photos/ answers/ --model flowers
    python classify_folder.py paths.txt answers/ --model flowers --format parquet

Answers are written in parts, `answers/part-00000.jsonl` and on, each of them whole or not there. The parts
are the checkpoint: a run asks only for images that none of them names. So the same command continues a run
that was stopped, and, tomorrow, takes what has been added to the folder. A bad image has its error in its
row.

Exit status: 0 when every image of this run was classified, 1 when some could not be, 2 for wrong usage, 3
when the run ended early; what it had is written.
"""

import argparse
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from graftserve.client import Client, ClientError, InvalidImageError, Prediction

__all__ = ["main"]

Row: TypeAlias = dict[str, Any]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Do it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Classify the images that are not classified yet.")
    parser.add_argument("images", type=Path, help="a folder, or a file with one path in each line")
    parser.add_argument("output", type=Path, help="the folder of the parts")
    parser.add_argument("--model", required=True)
    parser.add_argument("--target", default="localhost:8500")
    parser.add_argument("--format", choices=sorted(_WRITERS), default="jsonl")
    parser.add_argument("--part-rows", type=int, default=10_000, help="rows in a part (default: 10000)")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for an image, retries included")
    args = parser.parse_args(arguments)
    if args.part_rows < 1:
        parser.error(f"--part-rows: expected 1 or more, got {args.part_rows}")
    if not args.images.exists():
        parser.error(f"{args.images}: there is no such folder or file")

    args.output.mkdir(parents=True, exist_ok=True)
    parts = Parts(args.output, args.format, args.part_rows)
    done = parts.images()
    failed = 0
    signal.signal(signal.SIGTERM, _stop)  # what Kubernetes and systemd send
    try:
        with parts, Client(args.target, args.model, timeout_s=args.timeout_s) as client:
            todo = (path for path in _paths(args.images) if path not in done)
            with closing(_answers(client, todo)) as answers:
                for path, answer in answers:
                    row = _row(path, answer)
                    failed += row["error"] is not None
                    parts.add(row)
    except (ClientError, OSError, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        _say(f"{reason}; {parts.added} images done and kept in {args.output}: the same command continues")
        return 3
    _say(f"{parts.added} images classified, {failed} of them failed; {len(done)} were done before")
    return 1 if failed else 0


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt("ended by SIGTERM")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _paths(source: Path) -> Iterator[str]:
    """Those in a list, or of all images below a folder."""
    if source.is_file():
        with source.open(encoding="utf-8") as lines:
            yield from filter(None, map(str.strip, lines))
        return
    for folder, folders, names in os.walk(source):
        folders.sort()
        yield from (
            os.path.join(folder, name) for name in sorted(names) if Path(name).suffix.lower() in _SUFFIXES
        )


def _answers(
    client: Client, paths: Iterable[str]
) -> Generator[tuple[str, Prediction | InvalidImageError], None, None]:
    """Each path with its answer, in order. The client reads a bounded number of images ahead."""
    asked: deque[str] = deque()

    def images() -> Iterator[str]:
        for path in paths:
            asked.append(path)
            yield path

    for answer in client.stream(images()):
        yield asked.popleft(), answer


def _row(path: str, answer: Prediction | InvalidImageError) -> Row:
    if isinstance(answer, InvalidImageError):
        return {"image": path, "label": None, "score": None, "version": None, "error": str(answer)}
    return {
        "image": path,
        "label": answer.label,
        "score": answer.score,
        "version": answer.version,
        "error": None,
    }


# Parts


class Parts:
    """Rows, gathered into files; a context manager that writes what is left, whatever ended the block.

    added: how many rows this run has added.
    """

    def __init__(self, folder: Path, file_format: str, rows: int) -> None:
        self._folder, self._format, self._rows = folder, file_format, rows
        self._pending: list[Row] = []
        self.added = 0

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def images(self) -> set[str]:
        """The images that the parts name: some 100 bytes of memory for each."""
        read = _READERS[self._format]
        return {image for path in self._paths() for image in read(path)}

    def add(self, row: Row) -> None:
        """Written when the part is full."""
        self._pending.append(row)
        self.added += 1
        if len(self._pending) == self._rows:
            self._write()

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"part-*.{self._format}"))

    def _write(self) -> None:
        if not self._pending:
            return
        number = max((int(path.stem.removeprefix("part-")) for path in self._paths()), default=-1) + 1
        path = self._folder / f"part-{number:05}.{self._format}"
        temporary = path.with_name(f".{path.name}.unfinished")
        _WRITERS[self._format](self._pending, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        self._pending = []


def _write_jsonl(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _jsonl_images(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["image"] for line in lines]


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "image": pyarrow.string(),
        "label": pyarrow.string(),
        "score": pyarrow.float32(),
        "version": pyarrow.int64(),
        "error": pyarrow.string(),
    }
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(columns)), path)


def _parquet_images(path: Path) -> list[str]:
    from pyarrow import parquet

    images: list[str] = parquet.read_table(path, columns=["image"])["image"].to_pylist()
    return images


_WRITERS = {"jsonl": _write_jsonl, "parquet": _write_parquet}
_READERS = {"jsonl": _jsonl_images, "parquet": _parquet_images}

if __name__ == "__main__":
    sys.exit(main())
