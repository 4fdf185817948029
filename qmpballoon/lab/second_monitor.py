"""A second monitor of a guest's QEMU, independent of the agent's code, to check the agent with."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from qemu.qmp import ExecInterruptedError, QMPClient, QMPError

from qmpballoon.lab.require import LabError
from qmpballoon.lab.waiting import eventually

_ANSWER_S: Final = 30.0  # a millisecond on an idle machine


class SecondMonitor:
    """A plain QMP client on a second monitor."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.client = QMPClient("lab")
        self.client.logger.setLevel(logging.CRITICAL)  # it logs an error for each QEMU that a test kills

    async def connect(self, *, timeout_s: float = _ANSWER_S) -> None:
        """Connect to a QEMU that listens.

        Raises:
            OSError: no process listens there.
            LabError: no greeting within ``timeout_s``, or the server is not a QEMU.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self.client.connect(str(self.socket))
        except TimeoutError as error:
            raise LabError(f"{self.socket.name}: no greeting within {timeout_s:g} s") from error
        except QMPError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            if isinstance(error.__cause__, EOFError):
                raise ConnectionResetError(f"{self.socket.name}: closed before the greeting") from error
            raise LabError(f"{self.socket.name}: {error}") from error

    async def close(self) -> None:
        """Disconnect; QEMU may have ended already."""
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                await self.client.disconnect()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = _ANSWER_S
    ) -> object:
        """Execute a QMP command and return what QEMU answers.

        Raises:
            qemu.qmp.ExecuteError: QEMU refused it.
            LabError: no answer within ``timeout_s``, or the connection is lost.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.client.execute(command, dict(arguments or {}))
        except TimeoutError as error:
            raise LabError(f"{self.socket.name}: {command} not answered within {timeout_s:g} s") from error
        except ExecInterruptedError as error:
            raise LabError(f"{self.socket.name}: connection lost during {command}") from error

    async def _member(
        self, member: str, command: str, arguments: Mapping[str, object] | None = None
    ) -> object:
        answer = await self.execute(command, arguments)
        if not isinstance(answer, dict) or member not in answer:
            raise LabError(f"{self.socket.name}: {command} answered {answer!r}, without {member}")
        return answer[member]

    async def actual(self) -> int:
        """Return ``actual`` of query-balloon: what the guest has left, in bytes."""
        actual = await self._member("actual", "query-balloon")
        if not isinstance(actual, int):
            raise LabError(f"{self.socket.name}: actual is {actual!r}")
        return actual

    async def version(self) -> str:
        """Return QEMU's version, such as ``7.2.22``."""
        qemu = await self._member("qemu", "query-version")
        if not isinstance(qemu, dict):
            raise LabError(f"{self.socket.name}: its version is {qemu!r}")
        return ".".join(str(qemu[part]) for part in ("major", "minor", "micro"))

    async def status(self) -> str:
        """Return the run state in QMP's terms, such as ``running``."""
        return str(await self._member("status", "query-status"))

    async def balloon_path(self) -> str:
        """Return the QOM path of the balloon device.

        Raises:
            LabError: there is none.
        """
        for container in ("/machine/peripheral", "/machine/peripheral-anon"):
            found = await self.execute("qom-list", {"path": container})
            for child in found if isinstance(found, list) else []:
                if str(child["type"]).startswith("child<virtio-balloon"):
                    return f"{container}/{child['name']}"
        raise LabError(f"{self.socket.name}: no balloon device")

    async def stats(self) -> dict[str, int]:
        """Return the guest's statistics as the device has them, with ``last-update`` among them."""
        found = await self.execute("qom-get", {"path": await self.balloon_path(), "property": "guest-stats"})
        if not isinstance(found, dict):
            raise LabError(f"{self.socket.name}: guest-stats is {found!r}")
        return {**found["stats"], "last-update": found["last-update"]}

    async def set_target(self, size: int) -> None:
        """Set the balloon target, in bytes, without the agent."""
        await self.execute("balloon", {"value": size})

    async def until_actual(self, condition: Callable[[int], bool], *, timeout_s: float, what: str) -> int:
        """Wait until ``condition`` holds for ``actual`` and return it.

        Raises:
            LabError: not within ``timeout_s``; the message has ``what`` was expected and the last value.
        """
        return await eventually(self.actual, condition, timeout_s=timeout_s, what=what)
