"""The options of every command that talks to a server."""

import base64
import binascii
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from .output import CommandError

__all__ = ["Connection", "access_options", "connection_options"]

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_ACCESS_NAMES: Final = ("tls", "tls_ca", "tls_cert", "tls_key", "tls_server_name", "headers")
# What gRPC says where this end refuses the other's certificate or protocol, and what to try.
_NOT_TRUSTED: Final = "who signed the certificate is not trusted: give the authority's as --tls-ca"
_REFUSED: Final = {
    "WRONG_VERSION_NUMBER": "the port speaks no TLS: try without --tls and --tls-*",
    "Hostname Verification Check failed": (
        "the certificate is for another name: give that as --tls-server-name"
    ),
    "unable to get local issuer certificate": _NOT_TRUSTED,
    "self signed certificate": _NOT_TRUSTED,
    "certificate has expired": "give the server a new certificate",
}
# And of a connection that the other end dropped before it was one: it may refuse ours, or be restarting.
_HUNG_UP: Final = ("Socket closed", "Connection reset")


@dataclass(frozen=True)
class Connection:
    """How servers are reached, beside their addresses.

    authorities: PEM, whom to trust; None for those that gRPC brings.
    certificate, key: PEM, to be shown to a server that asks; both or neither.
    server_name: what the server's certificate says, if not the host that is dialled.
    metadata: sent with every request.
    """

    tls: bool = False
    authorities: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    metadata: Mapping[str, str | bytes] = field(default_factory=dict, repr=False)

    def client_arguments(self) -> dict[str, Any]:
        """Arguments by name of Client, of ModelServer and of RawCaller."""
        import grpc

        credentials, options = None, {}
        if self.tls:
            credentials = grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate)
        if self.server_name is not None:
            options["grpc.ssl_target_name_override"] = self.server_name
        return {"credentials": credentials, "metadata": self.metadata, "channel_options": options}

    def explained(self, message: str) -> str:
        """The message of a failure, with the option to try where gRPC's words in it let that be told."""
        hint = self._hint(message)
        return f"{message} ({hint})" if hint else message

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Errors that come out of it say which option to try."""
        try:
            yield
        except Exception as error:
            message = str(error)
            if (explained := self.explained(message)) != message:
                raise CommandError(explained) from error
            raise

    @staticmethod
    def is_refused(message: str) -> bool:
        """Whether a failure's message says that this end refused the server: asking again does not help."""
        return "UNAVAILABLE" in message and any(words in message for words in _REFUSED)

    def _hint(self, message: str) -> str:
        if "UNAVAILABLE" not in message:
            return ""
        for words, hint in _REFUSED.items():
            if words in message:
                return hint
        if not any(words in message for words in _HUNG_UP):
            return ""
        if not self.tls:
            return "is it a TLS port? try --tls, or --tls-ca"
        if self.certificate is None:
            return "does the server ask for a certificate? give --tls-cert and --tls-key"
        return "does the server trust who signed --tls-cert, and is that still valid?"


def access_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --tls, --tls-ca, --tls-cert, --tls-key, --tls-server-name and --header; passed as `connection`."""

    @wraps(command)
    def connected(**values: Any) -> None:
        connection = _connection(**{name: values.pop(name) for name in _ACCESS_NAMES})
        with connection.explaining():
            command(connection=connection, **values)

    file = click.Path(path_type=Path)
    options = (
        click.option(
            "--tls",
            is_flag=True,
            help="Use TLS, with the system's root certificates. Any --tls-* implies it.",
        ),
        click.option("--tls-ca", type=file, help="Trust the certificates in this PEM file instead."),
        click.option(
            "--tls-cert", type=file, help="Mutual TLS: the certificate to show, a PEM file; with --tls-key."
        ),
        click.option("--tls-key", type=file, help="Its private key, a PEM file, not encrypted."),
        click.option(
            "--tls-server-name",
            metavar="NAME",
            help="The name in the server's certificate, if another is dialled, as through a port-forward.",
        ),
        click.option(
            "--header",
            "headers",
            multiple=True,
            metavar="KEY=VALUE|KEY=@FILE",
            help="gRPC metadata of every request, such as authorization; a FILE keeps secrets out of process "
            "lists. May be given several times.",
        ),
    )
    return _with_options(connected, options)


def connection_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --target, --model, --version and --timeout-s, and what `access_options` adds."""
    options = (
        click.option(
            "--target", default="localhost:8500", show_default=True, help="gRPC address of the server."
        ),
        click.option("--model", required=True, help="Name of the model."),
        click.option(
            "--version", type=click.IntRange(min=0), help="Ask this version.  [default: the latest]"
        ),
        click.option(
            "--timeout-s",
            type=click.FloatRange(min=0, min_open=True),
            default=60.0,
            show_default=True,
            help="Seconds that a call may take, retries included.",
        ),
    )
    return _with_options(access_options(command), options)


def _with_options(command: CommandT, options: Sequence[Callable[[CommandT], CommandT]]) -> CommandT:
    for option in reversed(options):
        command = option(command)
    return command


def _connection(
    *,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_server_name: str | None,
    headers: Sequence[str],
) -> Connection:
    """As the options say, files read. Raises UsageError, CommandError."""
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together.")
    if tls_server_name == "":
        raise click.UsageError("--tls-server-name: expected the name in the certificate, got an empty one.")
    tls = tls or tls_ca is not None or tls_cert is not None or tls_server_name is not None
    authorities = certificate = key = None
    if tls_ca is not None:
        authorities = _read("--tls-ca", tls_ca)
        _check_authorities(authorities, tls_ca)
    elif tls:
        authorities = _system_authorities()
    if tls_cert is not None and tls_key is not None:
        certificate, key = _read("--tls-cert", tls_cert), _read("--tls-key", tls_key)
        _check_pair(tls_cert, tls_key)
    return Connection(tls, authorities, certificate, key, tls_server_name, _metadata(headers))


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{option}: {path}: {error.strerror}") from error


def _system_authorities() -> bytes | None:
    """The system's, as OpenSSL finds them; gRPC for Python would take a list of its own."""
    if os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"):
        return None  # gRPC reads that
    file = ssl.get_default_verify_paths().cafile
    return None if file is None else _read("--tls", Path(file))


# gRPC says of all that is wrong with certificates only that there is no server, and after a while.


def _check_authorities(pem: bytes, path: Path) -> None:
    try:
        # Comments between certificates may be in any encoding.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise CommandError(
            f"--tls-ca: expected certificates in PEM (-----BEGIN CERTIFICATE-----), got none in {path}"
        ) from error


def _check_pair(certificate: Path, key: Path) -> None:
    if not (certificate.is_file() and key.is_file()):
        return  # a pipe, which can be read only once

    def password() -> str:
        raise CommandError(f"--tls-key: {key} is encrypted: expected a key that needs no password")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # whether the key is long enough is the server's to say
    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        got = "another key" if error.reason == "KEY_VALUES_MISMATCH" else "something else"
        raise CommandError(
            f"--tls-cert, --tls-key: expected a certificate and its private key in PEM, got {got} in "
            f"{certificate} and {key}"
        ) from error


def _metadata(headers: Sequence[str]) -> dict[str, str | bytes]:
    metadata: dict[str, str | bytes] = {}
    for header in headers:
        key = re.split(r"[=:\s]", header, maxsplit=1)[0]
        value = header[len(key) + 1 :]
        if not header.startswith(f"{key}="):
            # Not all of it: it may be a secret.
            raise click.UsageError(f"--header: expected KEY=VALUE or KEY=@FILE, got {key!r} without a =.")
        if key in metadata:
            raise click.UsageError(f"--header: {key!r} was given twice.")
        metadata[key] = _metadata_value(key, value)
    return metadata


def _metadata_value(key: str, value: str) -> str | bytes:
    from graftserve.client.metadata import checked_metadata

    binary = key.endswith("-bin")
    where = "--header"
    failure: type[Exception] = click.UsageError
    found: str | bytes = value
    if value.startswith("@"):
        path = Path(value[1:])
        where, failure = f"--header {key}=@{path}", CommandError
        content = _read(where, path)
        found = content if binary else content.decode("latin-1").rstrip("\r\n")
    elif binary:
        try:
            found = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise click.UsageError(f"--header: expected base64 as the value of {key!r}.") from error
    try:
        checked_metadata({key: found})
    except ValueError as error:
        raise failure(f"{where}: {error}") from error
    return found
