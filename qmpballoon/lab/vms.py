"""QEMUs for blocking callers: the lab's guests, or QEMUs with a command line of the caller's own."""

from __future__ import annotations

import os
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from qmpballoon.lab.guest import BalloonDevice, LabGuest, balloon_of
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.require import LabError
from qmpballoon.loop_thread import LoopClosed, LoopThread
from qmpballoon.units import MIB, Size, parse_size

T = TypeVar("T")

_NOT_ENDED: Final = "the QEMU was ended"


class QemuVm:
    """A running QEMU; made by `QemuVms.start`. The sizes are bytes, unless they are typed as text.

    ``socket`` is its QMP monitor, ``console`` the file with what its first serial line prints, ``log`` QEMU's
    own output, ``pid`` the process. `execute`, and for the lab's guest `command`, do not use ``socket``.
    """

    def __init__(self, guest: LabGuest, loop: LoopThread) -> None:
        self.name = guest.name
        self.socket = guest.socket
        self.console = guest.console
        self.log = guest.log
        self.pid = guest.pid
        self._guest = guest
        self._loop = loop

    def __fspath__(self) -> str:
        """Return the path of the monitor, so that the VM itself can be given to ``connect``."""
        return os.fspath(self.socket)

    @property
    def exit_status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs.

        Raises:
            LabError: it was ended by `kill` or `terminate`.
        """
        return self._guest.program.exit_status

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a QMP command on a second monitor and return what it returns.

        Raises:
            LabError: QEMU refused the command, does not answer or has ended.
        """
        return self._call(self._guest.monitor.execute(command, arguments))

    def actual(self) -> int:
        """Return what the guest has left, read over the second monitor.

        Raises:
            LabError: as for `execute`.
        """
        return self._call(self._guest.monitor.actual())

    def command(self, command: str, *, timeout_s: float = 60.0) -> str:
        """Send a command to the lab's guest, such as ``hold 50`` (MiB), and return its answer.

        Raises:
            LabError: the guest answered with an error or not in time, or there is none of the lab.
        """
        return self._call(self._guest.command(command, timeout_s=timeout_s))

    def stop(self) -> None:
        """Stop the process (SIGSTOP): a QEMU that hangs."""
        self._guest.stop()

    def cont(self) -> None:
        """Continue the process (SIGCONT)."""
        self._guest.cont()

    def kill(self) -> None:
        """Kill QEMU with SIGKILL; its socket's file stays."""
        self._call(self._guest.kill())

    def terminate(self) -> None:
        """End QEMU with SIGTERM; it removes its socket's file."""
        self._call(self._guest.terminate())

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.call(coroutine)
        except LoopClosed:
            raise LabError(f"{self.name}: {_NOT_ENDED}") from None


class QemuVms:
    """Starts QEMUs and kills all of them on leaving, their files included.

    The kernel kills them if this process ends in any other way.
    """

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._loop = stack.enter_context(LoopThread("qmpballoon lab"))
            self._lab = Lab()
            self._loop.call(self._lab.__aenter__())
            stack.callback(lambda: self._loop.call(self._lab.__aexit__(None, None, None)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(
        self,
        *command: str | os.PathLike[str],
        name: str | None = None,
        memory: Size = 128 * MIB,
        driver: bool = True,
        deflate_on_oom: bool = False,
        fresh: bool = False,
        arguments: Sequence[str] = (),
        machine: str | None = None,
        qemu: str | os.PathLike[str] | None = None,
    ) -> QemuVm:
        """Start a QEMU and return it when it runs.

        Without a ``command`` it is the lab's guest, a small Linux under TCG, that has booted: with
        ``memory``, with or without its balloon ``driver`` and ``deflate_on_oom``, ``fresh`` (booted, in some
        3 s) or resumed from a saved state (in 0.2 s), and with more ``arguments`` of QEMU. ``machine`` is
        that of ``-machine``: q35, microvm; ``qemu`` a name or path (None: $QMPBALLOON_QEMU, else
        qemu-system-x86_64).

        With a ``command`` it is that QEMU and its options, as soon as it listens. Added are two monitors, and
        as far as the command says nothing about them ``-name``, ``-display none`` and ``-serial`` into the
        file ``console``.

        Raises:
            LabError: it cannot be built, started or booted; with the end of QEMU's output.
            MissingPrograms: QEMU is not installed; with the packages.
        """
        words = tuple(os.fspath(word) for word in command)
        if words:
            starting = self._lab.own_qemu(words, name)
        else:
            starting = self._lab.guest(
                name,
                memory=parse_size(memory),
                balloon=BalloonDevice(balloon_of(machine), deflate_on_oom=deflate_on_oom),
                driver=driver,
                fresh=fresh,
                arguments=arguments,
                kind=machine,
                qemu=None if qemu is None else os.fspath(qemu),
            )
        return QemuVm(self._loop.call(starting), self._loop)
