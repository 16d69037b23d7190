"""Write the SSLConfig that both servers read, from a Secret's files.

    ssl_config.py SECRET_DIR OUTPUT [--mutual]

tls.crt, tls.key: the server's. ca.crt: whoever signed the callers' certificates, which --mutual asks for.
"""

import json
import os
import sys
from pathlib import Path


def ssl_config(secret: Path, *, mutual: bool) -> str:
    """The text format of TensorFlow Serving's ssl_config.proto. Raises OSError if a file is missing."""
    fields = {"server_key": "tls.key", "server_cert": "tls.crt"}
    if mutual:
        fields["custom_ca"] = "ca.crt"
    # PEM is ASCII, and for ASCII JSON's strings are those of the text format.
    lines = [f"{field}: {json.dumps((secret / name).read_text('ascii'))}" for field, name in fields.items()]
    return "\n".join([*lines, f"client_verify: {str(mutual).lower()}", ""])


if __name__ == "__main__":
    secret_dir, output, *rest = sys.argv[1:]
    text = ssl_config(Path(secret_dir), mutual=rest == ["--mutual"])
    with open(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(text)
