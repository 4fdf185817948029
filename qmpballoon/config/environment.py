"""The only module of the configuration that reads the environment and the file system."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import pwd
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.addresses import is_file, refused_address
from qmpballoon.config.tree import CONTROL_NAME, MqttSettings
from qmpballoon.errors import ConfigurationError, Problem, StateUnusable
from qmpballoon.tls import client_context, unreadable

LARGEST_FILE: Final = 256 * 1024  # far more than any real configuration; bounds the cost of other files
LONGEST_PASSWORD: Final = 65535  # bytes: MQTT's own limit
CREDENTIAL: Final = "mqtt-password"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The defaults that depend on the machine and on the user."""

    host: str
    state_dir: str
    sockets: tuple[str, ...]
    password_file: str | None = None  # the systemd credential, if there is one
    control: str | None = None  # in the runtime directory that systemd made, if any


@dataclass(frozen=True, slots=True)
class MqttFiles:
    """The content of the files that ``[mqtt]`` names, to detect changes."""

    password: str | None = field(default=None, repr=False)
    digests: tuple[bytes, ...] = ()  # of the files for TLS


def surroundings_here() -> Surroundings:
    """Return the surroundings of this process: its environment, user and host name."""
    return surroundings_from(
        os.environ,
        host=socket.gethostname(),
        home=os.path.expanduser("~"),
        is_root=os.geteuid() == 0,
        exists=os.path.exists,
    )


def surroundings_from(
    environment: Mapping[str, str], *, host: str, home: str, is_root: bool, exists: Callable[[str], bool]
) -> Surroundings:
    """Return the surroundings for an environment; pure except ``exists``.

    ``$XDG_*`` that are not absolute are ignored, as the XDG base directory specification requires.
    """
    state_dir = environment.get("STATE_DIRECTORY", "").split(":")[0]
    if not state_dir.startswith("/"):
        state_home = environment.get("XDG_STATE_HOME", "")
        base = state_home if state_home.startswith("/") else os.path.join(home, ".local/state")
        state_dir = os.path.join(base, "qmpballoon")
    sockets = ["/run/qmpballoon/*.qmp"]
    runtime_dir = environment.get("XDG_RUNTIME_DIR", "")
    if runtime_dir.startswith("/") and not is_root:
        sockets.append(os.path.join(glob.escape(runtime_dir), "qmpballoon/*.qmp"))
    own_runtime_dir = environment.get("RUNTIME_DIRECTORY", "").split(":")[0]
    credentials = environment.get("CREDENTIALS_DIRECTORY", "")
    credential = os.path.join(credentials, CREDENTIAL)
    return Surroundings(
        host=host or "localhost",
        state_dir=state_dir,
        sockets=tuple(sockets),
        password_file=credential if credentials.startswith("/") and exists(credential) else None,
        control=os.path.join(own_runtime_dir, CONTROL_NAME) if own_runtime_dir.startswith("/") else None,
    )


def read_text(path: str) -> str:
    """Return the text of a configuration file.

    Raises:
        ConfigurationError: it cannot be read, is too large or is not UTF-8.
    """
    content = _read(path, LARGEST_FILE, source=path, key="")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(path, [Problem(line, "", "is not UTF-8 text")]) from None


def read_password(mqtt: MqttSettings) -> str | None:
    """Return the password from its file, without one trailing line end; None without a user name.

    Raises:
        ConfigurationError: the file cannot be read, is empty, too long or not UTF-8.
    """
    if mqtt.username is None or mqtt.password_file is None:
        return None
    source, key = mqtt.password_file, "mqtt.password_file"
    content = _read(source, LONGEST_PASSWORD + 2, source=source, key=key)
    try:
        password = content.decode()
    except UnicodeDecodeError:
        raise ConfigurationError(source, [Problem(None, key, "the password is not UTF-8 text")]) from None
    password = password.removesuffix("\n").removesuffix("\r") if password.endswith("\n") else password
    if not password:
        raise ConfigurationError(source, [Problem(None, key, "the file has no password in it")])
    if len(password.encode()) > LONGEST_PASSWORD:
        raise ConfigurationError(
            source, [Problem(None, key, f"the password has more than {LONGEST_PASSWORD} bytes")]
        )
    return password


def read_mqtt_files(mqtt: MqttSettings) -> MqttFiles:
    """Return the content of the files that ``[mqtt]`` names; those for TLS only if TLS is used.

    Raises:
        ConfigurationError: one of them cannot be read or used; the source is the file.
    """
    for wrong in unusable_files(mqtt):
        raise wrong
    paths = (mqtt.ca_file, mqtt.cert_file, mqtt.key_file) if _uses_tls(mqtt) else ()
    return MqttFiles(read_password(mqtt), tuple(_digest(path) for path in paths if path is not None))


def unusable_files(mqtt: MqttSettings) -> Iterator[ConfigurationError]:
    """Yield an error for each file that ``[mqtt]`` names and that cannot be read or used."""
    try:
        read_password(mqtt)
    except ConfigurationError as error:
        yield error
    if _uses_tls(mqtt):
        files = (mqtt.ca_file, mqtt.cert_file, mqtt.key_file)
        missing = list(unreadable(*files))
        yield from missing
        if not missing:
            try:
                client_context(*files)
            except ConfigurationError as error:
                yield error


def writable_by_others(path: str) -> str | None:
    """Return why a file is refused: others than its owner and root may write it; None if they may not."""
    mode, group = _mode_and_group(path)
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and group != 0):
        return f"others than its owner may write it (mode {mode:04o}): chmod go-w {path}"
    return None


def readable_by_all(path: str) -> str | None:
    """Return a warning about a secret that every user may read; None if they may not."""
    mode, _ = _mode_and_group(path)
    return f"every user may read it (mode {mode:04o}): chmod o-r {path}" if mode & stat.S_IROTH else None


def _mode_and_group(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # reported where the file is read
        return 0, 0
    return (stat.S_IMODE(status.st_mode), status.st_gid) if stat.S_ISREG(status.st_mode) else (0, 0)


def unusable_directory(path: str) -> StateUnusable | None:
    """Return the error if a directory of state cannot be made, written or trusted by this process.

    None if it can, and for an empty path: nothing is kept.
    """
    there = path or "/"
    while not os.path.lexists(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    try:
        if not os.path.isdir(there):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if path and os.path.isdir(path):
            check_is_ours(path)
        if path and not os.access(
            there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
        ):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as cause:
        return StateUnusable(path, cause)
    return None


def check_is_ours(directory: str | os.PathLike[str]) -> None:
    """Check that nobody else can put files or links into a directory.

    Raises:
        PermissionError: somebody can.
    """
    status = os.stat(directory)
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"it belongs to another user, {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, f"others may write in it (chmod go-w {os.fspath(directory)})")


def refused_path(typed: str, *, allow_remote: bool = False) -> str | None:
    """Return why a typed text is no socket, no glob and no address; None if it may be one."""
    if not typed:
        return "is empty: name a socket"
    if not is_file(typed):
        return refused_address(typed, allow_remote=allow_remote)
    if os.path.isdir(typed):
        return f"{typed} is a directory; name its sockets: '{os.path.join(typed, '*.qmp')}'"
    return None if os.path.lexists(typed) else refused_address(typed)


def user_name() -> str:
    """Return the name of the user of this process, or its number."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ConfigurationError(path, [Problem(None, "mqtt", f"cannot be read: {error.strerror}")]) from None


def _uses_tls(mqtt: MqttSettings) -> bool:
    return any(url.tls for url in mqtt.url)


def absolute(path: str) -> str:
    """Return a path that was typed at the command line as an absolute path."""
    return os.path.abspath(path) if path else path


def _read(path: str, most: int, *, source: str, key: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(source, [Problem(None, key, f"cannot be read: {reason}")]) from None
    if len(content) > most:
        raise ConfigurationError(source, [Problem(None, key, f"is longer than {most} bytes")])
    return content
