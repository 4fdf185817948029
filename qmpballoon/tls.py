"""The TLS context for a broker, made from files; an error names its file."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from qmpballoon.errors import ConfigurationError, Problem


def client_context(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Return a context that checks the broker's certificate and name; files are paths of PEM files.

    Without ``ca_file`` the certificates of the system are trusted.

    Raises:
        ConfigurationError: a file cannot be read or used; the source is the file.
    """
    for wrong in unreadable(ca_file, cert_file, key_file):
        raise wrong
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(ca_file)
    except (OSError, ssl.SSLError) as error:
        raise _wrong(ca_file or "certificates of the system", "ca_file", "used", error) from None
    if cert_file is not None:
        asked: list[bool] = []

        def passphrase() -> str:
            asked.append(True)
            return ""  # without a callback OpenSSL asks at the terminal

        try:
            context.load_cert_chain(cert_file, key_file, password=passphrase)
        except (OSError, ssl.SSLError) as error:
            if asked:
                encrypted = key_file or cert_file
                why = "the key is encrypted, and nobody is there to type its passphrase: use openssl pkey"
                raise ConfigurationError(encrypted, [Problem(None, "mqtt.key_file", why)]) from None
            reason = "used" if key_file is None else f"used with the key {key_file}"
            raise _wrong(cert_file, "cert_file", reason, error) from None
    return context


def unreadable(
    ca_file: str | None, cert_file: str | None, key_file: str | None
) -> Iterator[ConfigurationError]:
    """Yield an error for each file that cannot be read."""
    for key, path in (("ca_file", ca_file), ("cert_file", cert_file), ("key_file", key_file)):
        if path is not None:
            try:
                with open(path, "rb") as file:
                    file.read(1)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                yield _wrong(path, key, "read", error)


def _wrong(path: str, key: str, purpose: str, error: Exception) -> ConfigurationError:
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ConfigurationError(path, [Problem(None, f"mqtt.{key}", f"cannot be {purpose}: {reason}")])
