"""TLS, mutual TLS and metadata of every command that asks a server."""

import base64
import io
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from PIL import Image

from graftserve.cli.connection import Connection
from graftserve.client.testing import FakeServer
from graftserve.export.goldens import GoldenImage, write_goldens
from tests.certificates import Certificates, certificates

NAME = "flowers.shop.test"
SECRET = "Bearer hush"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """For a server called localhost."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """For a server called by another name than it is dialled by."""
    return certificates(tmp_path_factory.mktemp("certificates"), NAME)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(buffer.getvalue())
    return path


@pytest.fixture
def version(tmp_path: Path, photo: Path) -> Path:
    """A version with the golden image of a model that says roses, whatever it sees."""
    folder = tmp_path / "flowers" / "1"
    (folder / "assets.extra").mkdir(parents=True)
    write_goldens(folder, [GoldenImage("a.png", photo.read_bytes(), None, (0, 0, 1, 0, 0))])
    return folder


def serve(credentials: grpc.ServerCredentials | None) -> FakeServer:
    return FakeServer(answer=lambda image: "roses", host="localhost", credentials=credentials)


@pytest.mark.parametrize(
    ("command", "methods"),
    [
        (("status",), {"GetModelStatus"}),
        (("classify", "{photo}"), {"Predict"}),
        (("bench", "--concurrency", "2", "--duration-s", "0.1", "--warm-up-s", "0"), {"Predict"}),
        (("bench", "--raw", "--concurrency", "2", "--duration-s", "0.1", "--warm-up-s", "0"), {"Predict"}),
        (("verify", "{version}"), {"Predict"}),
    ],
)
def test_every_command_speaks_mutual_tls_and_sends_headers(
    graftserve: Any,
    named: Certificates,
    tmp_path: Path,
    photo: Path,
    version: Path,
    command: tuple[str, ...],
    methods: set[str],
) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    args = [arg.format(photo=photo, version=version) for arg in command]
    access = (*named.mutual, "--tls-server-name", NAME, "--header", f"authorization=@{tmp_path / 'token'}")
    with serve(named.credentials(mutual=True)) as server:
        status, out, err = graftserve(*args, "--target", server.target, "--model", "flowers", *access)
    assert status == 0, err
    assert out
    assert {call.method for call in server.calls} >= methods
    assert all(("authorization", SECRET) in call.metadata for call in server.calls)


def test_tls_alone_trusts_the_systems_authorities(
    graftserve: Any, files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(files.authority))
    with serve(files.credentials()) as server:
        asked = ("status", "--model", "flowers", "--target", server.target)
        assert graftserve(*asked, "--tls")[0] == 0
        # An authority of one's own replaces them.
        monkeypatch.setenv("SSL_CERT_FILE", str(files.folder / "none"))
        assert graftserve(*asked, *files.trusting)[0] == 0


def test_authorities_that_grpc_is_told_of_in_its_own_way(files: Certificates) -> None:
    with serve(files.credentials()) as server:
        command = (
            sys.executable,
            "-m",
            "graftserve.cli",
            "status",
            "--model",
            "flowers",
            "--tls",
            "--target",
        )
        done = subprocess.run(
            [*command, server.target],
            env=os.environ | {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(files.authority)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("server", "options", "hint"),
    [
        ("tls", "", "(is it a TLS port? try --tls, or --tls-ca)"),
        ("plain", "--tls-ca={files}/ca.crt", "(the port speaks no TLS: try without --tls and --tls-*)"),
        ("tls", "--tls-ca={named}/ca.crt", "not trusted: give the authority's as --tls-ca)"),
        ("named", "--tls-ca={named}/ca.crt", "for another name: give that as --tls-server-name)"),
        ("old", "--tls-ca={old}/ca.crt", "(give the server a new certificate)"),
        ("mutual", "--tls-ca={files}/ca.crt", "ask for a certificate? give --tls-cert and --tls-key)"),
        (
            "mutual",
            "--tls-ca={files}/ca.crt --tls-cert={named}/tls.crt --tls-key={named}/tls.key",
            "(does the server trust who signed --tls-cert, and is that still valid?)",
        ),
    ],
)
def test_what_does_not_fit_together_is_told_with_the_option_to_try(
    graftserve: Any,
    files: Certificates,
    named: Certificates,
    tmp_path: Path,
    server: str,
    options: str,
    hint: str,
) -> None:
    old = certificates(tmp_path / "old", not_after=datetime(2020, 1, 2, tzinfo=UTC))
    credentials = {
        "plain": None,
        "tls": files.credentials(),
        "mutual": files.credentials(mutual=True),
        "named": named.credentials(),
        "old": old.credentials(),
    }
    folders = {"files": files.folder, "named": named.folder, "old": old.folder}
    args = [arg.format(**folders) for arg in options.split()]
    with serve(credentials[server]) as running:
        status, out, err = graftserve("status", "--model", "flowers", "--target", running.target, *args)
    assert (status, out) == (1, "")
    # gRPC's C core writes there, too.
    (line,) = (line for line in err.splitlines() if line.startswith("Error: "))
    assert line.startswith("Error: UNAVAILABLE from localhost:")
    assert line.endswith(hint)


def test_a_run_that_is_kept_has_the_hint_too(
    graftserve: Any, files: Certificates, photo: Path, tmp_path: Path
) -> None:
    with serve(files.credentials()) as server:
        status, _, err = graftserve(
            *("classify", photo, "--model", "flowers", "--target", server.target),
            *("--output", tmp_path / "all.csv"),
        )
    assert status == 1
    assert "nothing was done (is it a TLS port? try --tls, or --tls-ca)" in err


def test_a_certificate_that_signed_itself_is_not_trusted(graftserve: Any, named: Certificates) -> None:
    chain = named.server + named.authority.read_bytes()
    with serve(grpc.ssl_server_credentials([(named.server_key, chain)])) as server:
        asked = ("status", "--model", "flowers", "--target", server.target, "--tls-server-name", NAME)
        status, _, err = graftserve(*asked)
    assert status == 1
    assert "self signed certificate" in err
    assert "(who signed the certificate is not trusted: give the authority's as --tls-ca)" in err


def test_other_failures_have_no_hint(graftserve: Any, files: Certificates) -> None:
    with serve(files.credentials()) as server:
        status, _, err = graftserve("status", "--model", "m", "--target", server.target, *files.trusting)
    assert status == 1
    assert "NOT_FOUND" in err
    assert "--tls" not in err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--tls-cert {files}/tls.crt", 2, "--tls-cert and --tls-key belong together"),
        ("--tls-key {files}/tls.key", 2, "--tls-cert and --tls-key belong together"),
        ("--tls-server-name=", 2, "--tls-server-name: expected the name in the certificate"),
        ("--tls-ca {files}/none", 1, "--tls-ca: {files}/none: No such file or directory"),
        ("--tls-ca {files}", 1, "--tls-ca: {files}: Is a directory"),
        (
            "--tls-ca {files}/tls.key",
            1,
            "--tls-ca: expected certificates in PEM (-----BEGIN CERTIFICATE-----), got none in {files}/tls.",
        ),
        ("--tls-ca /dev/null", 1, "--tls-ca: expected certificates in PEM"),
        ("--tls-cert {files}/tls.crt --tls-key {files}/none", 1, "--tls-key: {files}/none: No such file"),
        (
            "--tls-cert {files}/tls.key --tls-key {files}/tls.crt",
            1,
            "in PEM, got something else in {files}/tls.key and {files}/tls.crt",
        ),
        (
            "--tls-cert {files}/tls.crt --tls-key {named}/tls.key",
            1,
            "--tls-cert, --tls-key: expected a certificate and its private key in PEM, got another key in",
        ),
        ("--header authorization:hush", 2, "KEY=VALUE or KEY=@FILE, got 'authorization' without a =."),
        ("--header Authorization=hush", 2, "--header: expected metadata with names of 0-9 a-z"),
        ("--header =hush", 2, "--header: expected metadata with names of 0-9 a-z"),
        ("--header key=hüsh", 2, "got 'key' with a value of type str"),
        ("--header key=hush --header key=hush2", 2, "--header: 'key' was given twice."),
        ("--header key-bin=hush!", 2, "--header: expected base64 as the value of 'key-bin'."),
        ("--header key=@{files}/none", 1, "--header key=@{files}/none: {files}/none: No such file"),
        ("--header key=@{files}/tls.key", 1, "--header key=@{files}/tls.key: expected metadata with names"),
    ],
)
def test_what_cannot_be_used_is_one_clear_message(
    graftserve: Any,
    files: Certificates,
    named: Certificates,
    options: str,
    status: int,
    message: str,
) -> None:
    folders = {"files": files.folder, "named": named.folder}
    args = [arg.format(**folders) for arg in options.split()]
    ended, out, err = graftserve("status", "--model", "flowers", "--target", "localhost:1", *args)
    assert (ended, out) == (status, "")
    assert message.format(**folders) in err
    assert "hush" not in err
    assert "hüsh" not in err
    assert "PRIVATE KEY" not in err


def test_a_key_with_a_password_is_refused(graftserve: Any, files: Certificates, tmp_path: Path) -> None:
    key = serialization.load_pem_private_key((files.folder / "tls.key").read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hush"),
        )
    )
    status, _, err = graftserve(
        "status", "--model", "flowers", "--tls-cert", files.folder / "tls.crt", "--tls-key", locked
    )
    assert status == 1
    assert err == f"Error: --tls-key: {locked} is encrypted: expected a key that needs no password\n"


def test_files_may_be_pipes(graftserve: Any, files: Certificates, tmp_path: Path) -> None:
    """As a shell's <(kubectl get secret ...)."""

    def piped(name: str) -> Path:
        pipe = tmp_path / name
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_bytes, args=[(files.folder / name).read_bytes()]).start()
        return pipe

    with serve(files.credentials(mutual=True)) as server:
        status, _, err = graftserve(
            *("status", "--model", "flowers", "--target", server.target, "--tls-ca", piped("ca.crt")),
            *("--tls-cert", piped("tls.crt"), "--tls-key", piped("tls.key")),
        )
    assert status == 0, err


def test_authorities_may_have_comments_in_any_encoding(
    graftserve: Any, files: Certificates, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes("# Főtanúsítvány\n".encode("iso8859-2") + files.authority.read_bytes())
    with serve(files.credentials()) as server:
        asked = ("status", "--model", "flowers", "--target", server.target, "--tls-ca", bundle)
        assert graftserve(*asked)[0] == 0


def test_values_of_binary_headers_are_base64_or_a_files_bytes(graftserve: Any, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\x00\n")
    with serve(None) as server:
        status, _, err = graftserve(
            *("status", "--model", "flowers", "--target", server.target),
            *("--header", f"a-bin={base64.b64encode(bytes([255, 0])).decode()}"),
            *("--header", f"b-bin=@{tmp_path / 'raw'}", "--header", "c=d=e"),
        )
    assert status == 0, err
    assert {("a-bin", b"\xff\x00"), ("b-bin", b"\x00\n"), ("c", "d=e")} <= set(server.calls[0].metadata)


def test_verify_offline_asks_nobody(graftserve: Any, version: Path, files: Certificates) -> None:
    for options in (files.trusting, ("--header", "a=b")):
        status, _, err = graftserve("verify", version, *options)
        assert status == 2
        assert "--tls and --header are for a server: give its --target, too" in err


def test_secrets_are_not_shown() -> None:
    connection = Connection(tls=True, certificate=b"public", key=b"hush", metadata={"authorization": "hush"})
    assert "hush" not in repr(connection)
    assert "public" in repr(connection)
