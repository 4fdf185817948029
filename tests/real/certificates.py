"""Certificates and keys, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mqtt_listener import WAIT_S

from qmpballoon.lab.broker import HOST
from qmpballoon.lab.require import find_program


def certify(
    directory: Path, name: str, *options: str, subject: str = HOST, valid_for: str = f"IP:{HOST}"
) -> tuple[Path, Path]:
    """Make a self-signed certificate and its key; replaces existing files."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        [find_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-days", "2",
         "-subj", f"/CN={subject}", "-addext", f"subjectAltName={valid_for}",
         "-keyout", key, "-out", certificate, *(options or ("-nodes",))],
        check=True, capture_output=True, timeout=WAIT_S,
    )  # fmt: skip
    return certificate, key


def tls_options(certificate: Path, key: Path) -> list[str]:
    """Return mosquitto's options for a listener with TLS."""
    return [f"certfile {certificate}", f"keyfile {key}"]


def expire(certificate: Path, key: Path) -> None:
    """Replace a certificate by one that ended yesterday."""
    subprocess.run(
        [find_program("openssl"), "x509", "-in", certificate, "-signkey", key, "-days", "-1",
         "-out", certificate],
        check=True, capture_output=True, timeout=WAIT_S,
    )  # fmt: skip
