"""A context that starts guests and brokers, and removes all of them and their files at its end."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import BALLOON, BalloonDevice, LabGuest, Machine
from qmpballoon.lab.image import guest_image
from qmpballoon.lab.snapshot import snapshot_of
from qmpballoon.units import MIB


class Lab:
    """Starts guests and brokers in one directory; on leaving, ends all of them and removes their files.

    ``directory`` None makes a temporary one with a short name, as a socket's path has at most 107 bytes.
    ``progress`` gets a line before anything that takes seconds.
    """

    def __init__(
        self, directory: Path | None = None, *, progress: Callable[[str], None] = lambda line: None
    ) -> None:
        self._chosen = directory
        self._progress = progress
        self._stack = AsyncExitStack()
        self._names = 0
        self.guests: list[LabGuest] = []
        self.brokers: list[LabBroker] = []

    async def __aenter__(self) -> Self:
        if self._chosen is not None:
            self.directory = self._chosen
        else:
            temporary = tempfile.TemporaryDirectory(prefix="qb-", dir="/tmp")
            self.directory = Path(self._stack.enter_context(temporary))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def guest(
        self,
        name: str | None = None,
        *,
        memory: int = 128 * MIB,
        balloon: BalloonDevice | None = BALLOON,
        driver: bool = True,
        boot_delay_s: int = 0,
        disk: int = 0,
        arguments: Sequence[str] = (),
        qemu_name: str | None = "",
        fresh: bool = False,
        wait: bool = True,
        kind: str | None = None,
        qemu: str | None = None,
    ) -> LabGuest:
        """Start a Linux guest and return it.

        It resumes the saved state of a booted one, in 0.2 s; ``fresh``, or a ``boot_delay_s``, boots it,
        in about 3 s. ``name`` is that of its files (None: vm1, vm2, ...), ``qemu_name`` that of ``-name``
        ("": the same, None: no such option). Without ``wait`` it is returned as soon as QEMU listens. The
        rest: see `qmpballoon.lab.guest.Machine`.

        Raises:
            LabError: it cannot be built, started or booted.
        """
        image = await asyncio.to_thread(guest_image, self._progress)
        machine = Machine(
            memory,
            image,
            balloon,
            driver,
            boot_delay_s,
            disk,
            arguments=tuple(arguments),
            kind=kind,
            qemu=qemu,
        )
        saved = None if fresh or boot_delay_s else await snapshot_of(machine, self._progress)
        guest = await self._start(name, machine, qemu_name, saved)
        if wait:
            await guest.booted()
        return guest

    async def empty_qemu(
        self,
        name: str | None = None,
        *,
        memory: int = 64 * MIB,
        balloon: BalloonDevice | None = BALLOON,
        paused: bool = True,
        arguments: Sequence[str] = (),
        qemu_name: str | None = "",
    ) -> LabGuest:
        """Start a QEMU without a guest, in 0.05 s, for tests that need a monitor and no driver.

        Unless ``paused`` its firmware runs, finds no boot device and idles.

        Raises:
            LabError: it cannot be started.
        """
        machine = Machine(memory, None, balloon, paused=paused, arguments=tuple(arguments))
        return await self._start(name, machine, qemu_name, None)

    async def own_qemu(self, command: Sequence[str], name: str | None = None) -> LabGuest:
        """Start a QEMU with a command line of its own; see `qmpballoon.lab.vms.QemuVms.start`.

        Raises:
            LabError: it cannot be started.
        """
        return await self._start(name, Machine(command=tuple(command)), "", None)

    async def _start(
        self, name: str | None, machine: Machine, qemu_name: str | None, saved: Path | None
    ) -> LabGuest:
        self._names += 1
        guest = LabGuest(
            self.directory, machine, name=name or f"vm{self._names}", qemu_name=qemu_name, snapshot=saved
        )
        await self._stack.enter_async_context(guest)
        self.guests.append(guest)
        return guest

    async def broker(
        self,
        name: str | None = None,
        *,
        passwords: Mapping[str, str] | None = None,
        acl: Sequence[str] = (),
        allow_anonymous: bool | None = None,
        persistence: bool = False,
        websockets: bool = False,
        options: Sequence[str] = (),
        port: int | None = None,
    ) -> LabBroker:
        """Start a mosquitto and return it when it listens; the options are those of `LabBroker`.

        Raises:
            LabError: it cannot be started.
        """
        self._names += 1
        broker = LabBroker(
            self.directory,
            name=name or f"broker{self._names}",
            passwords=passwords,
            acl=acl,
            allow_anonymous=allow_anonymous,
            persistence=persistence,
            websockets=websockets,
            options=options,
            port=port,
        )
        await self._stack.enter_async_context(broker)
        self.brokers.append(broker)
        return broker
