"""A real mosquitto on a loopback port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmpballoon.lab.process import Program
from qmpballoon.lab.require import LabError, find_program, require_programs

HOST: Final = "127.0.0.1"

_START_S: Final = 60.0  # mosquitto listens after 0.05 s on an idle machine
_PORTS: Final = range(20_000, 32_000)  # below those that Linux gives to connections
_ATTEMPTS: Final = 10  # attempts at a free port: another program may take it before mosquitto's bind


class PortTaken(LabError):
    """Another program listens on the port."""


class LabBroker:
    """One mosquitto, independent of the machine's mosquitto configuration.

    All its files are in ``directory``. ``passwords`` maps users to passwords; ``acl`` are lines of
    mosquitto's ACL file; ``options`` are appended to its configuration, after the listener. Without
    ``persistence`` a restarted broker loses its retained messages. With ``websockets`` its only port serves
    MQTT over WebSockets. mosquitto 2.0 has no option that refuses MQTT 5. Use it as an async context manager,
    or ``start`` and ``close`` it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "broker",
        passwords: Mapping[str, str] | None = None,
        acl: Sequence[str] = (),
        allow_anonymous: bool | None = None,
        persistence: bool = False,
        websockets: bool = False,
        options: Sequence[str] = (),
        port: int | None = None,
    ) -> None:
        self.passwords = dict(passwords or {})
        self.acl = tuple(acl)
        self.allow_anonymous = not self.passwords if allow_anonymous is None else allow_anonymous
        self.persistence = persistence
        self.websockets = websockets
        self.options = tuple(options)
        self.log = directory / f"{name}.log"
        self._directory = directory
        self._name = name
        self._port = port
        self._program: Program | None = None

    @property
    def port(self) -> int:
        """The port, kept over restarts.

        Raises:
            LabError: never started.
        """
        if self._port is None:
            raise LabError(f"{self._name} was never started")
        return self._port

    @property
    def url(self) -> str:
        """What ``--broker`` takes."""
        return f"{'ws' if self.websockets else 'mqtt'}://{HOST}:{self.port}"

    @property
    def program(self) -> Program:
        """The running mosquitto process.

        Raises:
            LabError: not started.
        """
        if self._program is None:
            raise LabError(f"{self._name} is not started")
        return self._program

    # ---- life ----

    async def start(self) -> None:
        """Start mosquitto; return when it listens.

        Raises:
            PortTaken: another program has the port that was asked for, or used before a restart.
            LabError: it ended or does not listen in time; the message has the tail of its log.
            MissingPrograms: mosquitto is not installed.
        """
        require_programs("mosquitto", "mosquitto_passwd")
        if self._port is not None:
            return await self._start_at(self._port)
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(PortTaken):
                return await self._start_at(free_port())
        return await self._start_at(free_port())

    async def _start_at(self, port: int) -> None:
        configuration = self._write_configuration(port)
        self.log.unlink(missing_ok=True)
        program = Program(["mosquitto", "-c", str(configuration)], log=self.log)
        try:
            async with asyncio.timeout(_START_S):
                while b" running\n" not in self.log.read_bytes():  # logged after the bind
                    if program.exit_status is not None:
                        failure = program.failure("did not start")
                        raise (PortTaken if "Address already in use" in failure else LabError)(failure)
                    await asyncio.sleep(0.01)
        except TimeoutError as error:
            raise LabError(program.failure(f"does not listen after {_START_S:g} s")) from error
        else:
            self._program, self._port = program, port
        finally:
            if self._program is not program:
                program.destroy()

    def _write_configuration(self, port: int) -> Path:
        lines = [
            f"listener {port} {HOST}",
            f"protocol {'websockets' if self.websockets else 'mqtt'}",
            f"allow_anonymous {str(self.allow_anonymous).lower()}",
            "set_tcp_nodelay true",
            "log_dest stderr",
            "log_type all",
            "connection_messages true",
            f"persistence {str(self.persistence).lower()}",
            f"persistence_location {self._directory}/",
            f"persistence_file {self._name}.db",
            "autosave_interval 1",
            "autosave_on_changes true",  # a killed broker keeps its retained messages
        ]
        if os.geteuid() == 0:
            lines.append("user root")  # else it switches to the user mosquitto, which cannot read our files
        if self.passwords:
            passwords = self._write(
                "passwords", [f"{user}:{password}" for user, password in self.passwords.items()]
            )
            _hash_passwords(passwords)
            lines.append(f"password_file {passwords}")
        if self.acl:
            lines.append(f"acl_file {self._write('acl', self.acl)}")
        return self._write("conf", [*lines, *self.options])

    def _write(self, suffix: str, lines: Sequence[str]) -> Path:
        path = self._directory / f"{self._name}.{suffix}"
        path.touch(mode=0o600)
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    async def close(self) -> None:
        """End mosquitto, whatever state it is in; may be called again."""
        if self._program is not None:
            self._program.destroy()
            self._program = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---- faults ----

    def stop(self) -> None:
        """Make it hang: SIGSTOP."""
        self.program.signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Continue it: SIGCONT."""
        self.program.signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL, and reap: its clients see the connection break."""
        self.program.signal(signal.SIGKILL)
        await self.program.ended(timeout_s=_START_S)
        self._program = None

    async def terminate(self) -> None:
        """SIGTERM, and wait for the end; retained messages are saved with ``persistence``."""
        self.program.signal(signal.SIGTERM)
        await self.program.ended(timeout_s=_START_S)
        self._program = None

    async def restart(self) -> None:
        """Start it again on the same port; a running one is killed first.

        Raises:
            LabError: as for `start`.
        """
        await self.close()
        await self.start()


def free_port() -> int:
    """Return a free port that no outgoing connection gets, so that a restarted broker can bind it."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise LabError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free")


def _hash_passwords(file: Path) -> None:
    """Replace the passwords in the file by mosquitto's hashes."""
    subprocess.run([find_program("mosquitto_passwd"), "-U", str(file)], check=True, timeout=_START_S)
