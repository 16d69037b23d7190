r"""Ask the stable and the canary server for the same images; status 1 if their answers differ too often.

agreement.py --stable TARGET --canary TARGET --model NAME --images DIR --min-agreement SHARE \
    [--root-certificates FILE]

DIR: every file below it that is an image by its suffix, such as the golden images of a version.
FILE: PEM; with it the servers are called over TLS.
"""

import argparse
import sys
from pathlib import Path

import grpc

from graftserve.client import Client, ClientError, Prediction

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"}


def agreement(stable: Client, canary: Client, paths: list[Path]) -> float:
    """The share of images that both give the same label, or both call unreadable. Raises ClientError."""
    pairs = zip(stable.classify_many(paths), canary.classify_many(paths), strict=True)
    return sum(_answer(one) == _answer(other) for one, other in pairs) / len(paths)


def _answer(result: object) -> str | None:
    return result.label if isinstance(result, Prediction) else None


def main() -> str | None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("stable", "canary", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--min-agreement", required=True, type=float)
    parser.add_argument("--root-certificates", type=Path)
    args = parser.parse_args()
    credentials = None
    if args.root_certificates:
        credentials = grpc.ssl_channel_credentials(args.root_certificates.read_bytes())
    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        return f"{args.images}: expected images, got none: is this a version that graftserve export wrote?"
    try:
        with (
            Client(args.stable, model=args.model, credentials=credentials) as stable,
            Client(args.canary, model=args.model, credentials=credentials) as canary,
        ):
            share = agreement(stable, canary, paths)
    except ClientError as error:
        return str(error)
    line = f"{share:.4f} of {len(paths)} images get the same answer from both"
    if share < args.min_agreement:
        return f"{line}, and {args.min_agreement} are required"
    print(line)  # noqa: T201  # a program's result
    return None


if __name__ == "__main__":
    sys.exit(main())
