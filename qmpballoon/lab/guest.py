"""A real QEMU that runs a small Linux guest, or no guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmpballoon.lab.architecture import ARCHITECTURE
from qmpballoon.lab.image import GuestImage, blank_disk
from qmpballoon.lab.process import Program, tail
from qmpballoon.lab.require import LabError
from qmpballoon.lab.second_monitor import SecondMonitor
from qmpballoon.lab.serial import SerialPort
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

QEMU: Final = ARCHITECTURE.qemu
QEMU_VARIABLE: Final = "QMPBALLOON_QEMU"  # another QEMU for such guests, by its name or path

_MICROVM: Final = "microvm"
# The kernel finds no timer there that it could measure the processor's clock with; any value lets it boot.
_MICROVM_WORD: Final = "tsc_early_khz=2000000"
_START_S: Final = 60.0  # QEMU listens after 0.1 s on an idle machine
_COMMAND_S: Final = 60.0
_BOOT_S: Final = 180.0  # 2.6 s on an idle machine; the rest is for busy ones


@dataclass(frozen=True, slots=True)
class BalloonDevice:
    """The balloon device of a guest, as on QEMU's command line; ``id`` None leaves it anonymous."""

    kind: str = "virtio-balloon-pci"
    id: str | None = "balloon0"
    deflate_on_oom: bool = False
    free_page_reporting: bool = False

    def option(self) -> str:
        """Return the value of ``-device``."""
        parts = [self.kind]
        if self.id is not None:
            parts.append(f"id={self.id}")
        if self.deflate_on_oom:
            parts.append("deflate-on-oom=on")
        if self.free_page_reporting:
            parts.append("free-page-reporting=on")
        return ",".join(parts)


BALLOON: Final = BalloonDevice()


def balloon_of(machine: str | None) -> str:
    """Return the balloon device for a machine: microvm has no PCI bus unless it is asked for one."""
    is_bare = machine is not None and machine.startswith(_MICROVM) and "pcie=on" not in machine
    return "virtio-balloon-device" if is_bare else "virtio-balloon-pci"


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """The guest kernel's own memory figures, in bytes; read inside the guest, not from the balloon."""

    total: int
    free: int
    available: int
    cached: int
    held: int  # by our workload
    oom_kills: int  # since boot
    uptime_ms: int
    driver: bool  # whether the balloon driver is loaded


@dataclass(frozen=True, slots=True)
class GuestFigures:
    """Figures that cost the guest one read of a file, for many samples a second; in bytes."""

    available: int
    held: int  # by our workload
    kills: int  # of our workload since boot


@dataclass(frozen=True, slots=True)
class Machine:
    """The options of a guest, except its name and the place of its sockets."""

    memory: int = 128 * MIB
    image: GuestImage | None = None  # None: no kernel, QEMU alone
    balloon: BalloonDevice | None = BALLOON
    driver: bool = True  # False: the guest does not load its balloon driver
    boot_delay_s: int = 0  # before the guest loads any driver
    disk: int = 0  # bytes of a blank read-only disk, for `cache N` to read; 0: none
    paused: bool = False  # -S: runs no instruction
    arguments: tuple[str, ...] = ()  # appended to QEMU's
    kind: str | None = None  # -machine: q35, microvm, ...; None: QEMU's default
    qemu: str | None = None  # name or path; None: $QMPBALLOON_QEMU, else QEMU
    command: tuple[str, ...] = ()  # a QEMU and its options, instead of all of the above

    @property
    def program(self) -> str:
        """The QEMU that runs it."""
        return self.command[0] if self.command else self.qemu or os.environ.get(QEMU_VARIABLE) or QEMU

    @property
    def is_microvm(self) -> bool:
        """Whether it is QEMU's minimal machine for x86."""
        return self.kind is not None and self.kind.startswith(_MICROVM)

    def options(self) -> list[str]:
        """Return QEMU's options for this machine."""
        if self.command:
            return list(self.command[1:])
        options = [
            *ARCHITECTURE.machine,
            "-accel",
            "tcg,tb-size=16",
            "-m",
            f"{self.memory // MIB}M",
            "-nodefaults",
            "-display",
            "none",
        ]
        if self.kind is not None:
            options += ["-machine", self.kind]
        if self.image is not None:
            words = [f"console={ARCHITECTURE.console}", "panic=-1"]
            words += [] if self.driver else ["qmpballoon.nodriver"]
            words += [f"qmpballoon.boot_delay={self.boot_delay_s}"] if self.boot_delay_s else []
            words += [_MICROVM_WORD] if self.is_microvm else []
            options += ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs)]
            options += ["-append", " ".join(words)]
        if self.balloon is not None:
            options += ["-device", self.balloon.option()]
        if self.disk:
            options += ["-drive", f"file={blank_disk(self.disk)},if=virtio,format=raw,readonly=on"]
        if self.paused:
            options.append("-S")
        return [*options, *self.arguments]


class LabGuest:
    """One guest: its QEMU process, a monitor for the agent, a second one for tests, a serial line.

    In ``directory``, which must be short (a socket's path has at most 107 bytes): ``NAME.qmp`` is the monitor
    for the agent, ``NAME.monitor`` the second one, ``NAME.serial`` the serial line, ``NAME.console`` the log
    of its kernel and ``NAME.log`` the output of QEMU. Use it as an async context manager, or ``start`` and
    ``close`` it.

    A ``snapshot`` (see `qmpballoon.lab.snapshot.snapshot_of`) is resumed instead of booting.
    """

    def __init__(
        self,
        directory: Path,
        machine: Machine,
        *,
        name: str = "guest",
        qemu_name: str | None = "",
        snapshot: Path | None = None,
    ) -> None:
        self.machine = machine
        self.name = name
        self.qemu_name = name if qemu_name == "" else qemu_name  # None: no -name
        self.snapshot = snapshot
        self.socket = directory / f"{name}.qmp"
        self.console = directory / f"{name}.console"
        self.log = directory / f"{name}.log"
        self._monitor_socket = directory / f"{name}.monitor"
        self._serial_socket = directory / f"{name}.serial"
        self._program: Program | None = None
        self._monitor: SecondMonitor | None = None
        self._serial: SerialPort | None = None

    # ---- life ----

    async def start(self) -> None:
        """Start QEMU; return when it listens and, with a snapshot, runs.

        Raises:
            LabError: QEMU ended, or does not listen in time; the message has QEMU's output.
            MissingPrograms: QEMU is not installed.
        """
        try:
            self._program = Program([self.machine.program, *self._arguments()], log=self.log)
            self._monitor = SecondMonitor(self._monitor_socket)
            await self._until_listening()
            if self.machine.image is not None:
                self._serial = await SerialPort.open(self._serial_socket)
            if self.snapshot is not None:
                await eventually(
                    self._monitor.status,
                    "running".__eq__,
                    timeout_s=_START_S,
                    what=f"{self.name} resumes",
                )
        except BaseException:
            await self.close()
            raise

    def _arguments(self) -> list[str]:
        own = self.machine.command
        arguments = [] if self.qemu_name is None else ["-name", self.qemu_name.replace(",", ",,")]
        arguments = [] if "-name" in own else arguments
        if own and not {"-display", "-nographic"} & set(own):
            arguments += ["-display", "none"]
        if own and not {"-serial", "-nographic"} & set(own):
            arguments += ["-serial", f"file:{self.console}"]
        arguments += ["-qmp", f"unix:{self.socket},server=on,wait=off"]
        arguments += ["-qmp", f"unix:{self._monitor_socket},server=on,wait=off"]
        if self.machine.image is not None:
            arguments += ["-serial", f"file:{self.console}"]
            arguments += ["-chardev", f"socket,id=commands,path={self._serial_socket},server=on,wait=off"]
            if self.machine.is_microvm:  # -serial gives it one line at most
                arguments += ["-device", "isa-serial,chardev=commands,index=1"]
            else:
                arguments += ARCHITECTURE.second_line
        if self.snapshot is not None:
            arguments += ["-incoming", f"exec:cat {shlex.quote(str(self.snapshot))}"]
        return [*arguments, *self.machine.options()]

    async def _until_listening(self) -> None:
        async def try_to_connect() -> bool:
            if self.program.exit_status is not None:
                raise LabError(self.program.failure("did not start"))
            try:
                await self.monitor.connect()
            except (FileNotFoundError, ConnectionError):  # not yet, or QEMU has just ended
                return False
            return True

        await eventually(
            try_to_connect, bool, timeout_s=_START_S, what=f"{self.name} listens", interval_s=0.01
        )

    async def close(self) -> None:
        """End QEMU, whatever state it is in, and remove its sockets; may be called again."""
        if self._program is not None:
            self._program.destroy()  # first, and without an await: also done when cancelled
        for socket in (self.socket, self._monitor_socket, self._serial_socket):
            socket.unlink(missing_ok=True)
        await self._disconnect()

    async def _disconnect(self) -> None:
        serial, monitor = self._serial, self._monitor
        self._program = self._serial = self._monitor = None
        if serial is not None:
            serial.close()
        if monitor is not None:
            await monitor.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---- QEMU ----

    @property
    def program(self) -> Program:
        """The running QEMU process.

        Raises:
            LabError: not started.
        """
        if self._program is None:
            raise LabError(f"{self.name} does not run")
        return self._program

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.program.pid

    @property
    def memory(self) -> int:
        """What ``actual`` is with an empty balloon, in bytes."""
        return self.machine.memory

    @property
    def monitor(self) -> SecondMonitor:
        """The second monitor.

        Raises:
            LabError: not started.
        """
        if self._monitor is None:
            raise LabError(f"{self.name} does not run")
        return self._monitor

    def stop(self) -> None:
        """Stop the process: SIGSTOP."""
        self.program.signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Continue the process: SIGCONT."""
        self.program.signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL, and reap; the socket file is left behind."""
        self.program.signal(signal.SIGKILL)
        await self.program.ended(timeout_s=_START_S)
        await self._disconnect()

    async def terminate(self) -> None:
        """SIGTERM, and wait for the end: QEMU removes its sockets itself."""
        self.program.signal(signal.SIGTERM)
        await self.program.ended(timeout_s=_START_S)
        await self._disconnect()

    async def restart(self) -> None:
        """Start a new QEMU on the same sockets; a running one is killed first."""
        if self._program is not None:
            await self.kill()
        await self.start()

    # ---- the guest ----

    @property
    def boots(self) -> int:
        """How often this QEMU's guest has booted."""
        return 0 if self._serial is None else self._serial.boots

    async def booted(self, *, boots: int = 1, timeout_s: float = _BOOT_S) -> None:
        """Wait until the guest has booted for the ``boots``-th time in this QEMU and takes commands.

        Raises:
            LabError: not in time; the message has the tail of the console.
        """
        serial = self._open_serial()
        try:
            async with asyncio.timeout(timeout_s):
                if self.snapshot is not None and serial.boots == 0:
                    await serial.command("ping", timeout_s=timeout_s)
                while serial.boots < boots:
                    if self.program.exit_status is not None:
                        raise LabError(self.program.failure("ended before the guest had booted"))
                    serial.line_received.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1):  # checks once a second whether QEMU ended
                            await serial.line_received.wait()
        except (TimeoutError, LabError) as error:
            why = str(error) or f"not within {timeout_s:g} s"
            raise LabError(f"{self.name} has not booted: {why}{tail(self.console)}") from error

    async def command(self, command: str, *, timeout_s: float = _COMMAND_S) -> str:
        """Send one command to the guest (``guest_init.c`` lists them); return the words after ``ok``.

        Raises:
            LabError: the guest answered with an error or not in time; with the tail of the console.
        """
        try:
            return await self._open_serial().command(command, timeout_s=timeout_s)
        except LabError as error:
            raise LabError(f"{self.name}: {error}{tail(self.console)}") from error

    async def guest_memory(self) -> GuestMemory:
        """Return the guest's own figures.

        Raises:
            LabError: as for `command`.
        """
        fields = dict(word.split("=") for word in (await self.command("stat")).split())
        driver = fields.pop("driver") == "1"
        return GuestMemory(**{key: int(value) for key, value in fields.items()}, driver=driver)

    async def figures(self, *, timeout_s: float = _COMMAND_S) -> GuestFigures:
        """Return the guest's most important figures.

        Raises:
            LabError: as for `command`.
        """
        words = await self.command("figures", timeout_s=timeout_s)
        return GuestFigures(**{key: int(value) for key, value in (word.split("=") for word in words.split())})

    def reboot(self) -> None:
        """Let the guest reboot itself; await `booted` with ``boots`` one higher."""
        self._open_serial().send("r reboot")

    def power_off(self) -> None:
        """Let the guest power itself off: QEMU shuts down."""
        self._open_serial().send("p poweroff")

    def _open_serial(self) -> SerialPort:
        if self._serial is None:
            raise LabError(f"{self.name} has no guest inside, or does not run")
        return self._serial
