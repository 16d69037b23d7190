"""An authority, its certificates, and their files."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import trustme
from google.protobuf import text_format

from graftserve.client.wire import SSLConfig

__all__ = ["Certificates", "certificates"]


@dataclass(frozen=True)
class Certificates:
    """The authority's certificate, a caller's certificate and its key, as PEM files in `folder`.

    server, server_key: PEM, for the name of the server.
    """

    folder: Path
    server: bytes
    server_key: bytes

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def trusting(self) -> tuple[Any, ...]:
        """The options that trust the authority."""
        return ("--tls-ca", self.authority)

    @property
    def mutual(self) -> tuple[Any, ...]:
        """The options that show the caller's certificate, too."""
        return (
            *self.trusting,
            *("--tls-cert", self.folder / "tls.crt", "--tls-key", self.folder / "tls.key"),
        )

    def credentials(self, *, mutual: bool = False) -> grpc.ServerCredentials:
        """Of a server; mutual: it asks for the caller's certificate."""
        root = self.authority.read_bytes() if mutual else None
        return grpc.ssl_server_credentials([(self.server_key, self.server)], root, mutual)

    def ssl_config(self) -> Path:
        """A file for --ssl_config_file, of a server that asks for the caller's certificate."""
        config = SSLConfig(
            server_key=self.server_key.decode(),
            server_cert=self.server.decode(),
            custom_ca=self.authority.read_text(),
            client_verify=True,
        )
        file = self.folder / "ssl.config"
        file.write_text(text_format.MessageToString(config))
        return file


def certificates(folder: Path, name: str = "localhost", *, not_after: datetime | None = None) -> Certificates:
    """Made anew, for a server of that name. not_after: when its certificate expires; far away by default."""
    authority = trustme.CA()
    server = authority.issue_cert(name, not_after=not_after)
    caller = authority.issue_cert("caller@shop.test")
    folder.mkdir(exist_ok=True)
    (folder / "ca.crt").write_bytes(authority.cert_pem.bytes())
    (folder / "tls.crt").write_bytes(_chain(caller))
    (folder / "tls.key").write_bytes(caller.private_key_pem.bytes())
    return Certificates(folder, _chain(server), server.private_key_pem.bytes())


def _chain(certificate: trustme.LeafCert) -> bytes:
    return b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
