"""The public Python API for programs without asyncio: the names of `qmpballoon.api` without ``await``.

::

    with qmpballoon.sync.connect("/run/web1.qmp") as vm:
        vm.ready(timeout_s=30)
        vm.set_target("256MiB", wait_s=10)
        print(vm.state().guest.available)

Each connection has an event loop on a thread of its own, so it also works where a loop is running. It is the
loop of the event loop policy: asyncio's, or uvloop's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from qmpballoon import api
from qmpballoon.errors import ConnectionLost
from qmpballoon.loop_thread import LoopClosed, LoopThread
from qmpballoon.model.records import Event, VmState
from qmpballoon.opening import Process
from qmpballoon.units import Size

T = TypeVar("T")


@contextmanager
def connect(
    socket: str | os.PathLike[str],
    *,
    timeout_s: float = 5.0,
    process: Process | None = None,
    allow_remote: bool = False,
) -> Iterator[Vm]:
    """Open a VM's monitor as `qmpballoon.connect` does; the arguments and errors are the same."""
    path = os.fspath(socket)
    with LoopThread(f"qmpballoon {path}") as loop:
        opening = api.connect(path, timeout_s=timeout_s, process=process, allow_remote=allow_remote)
        vm = Vm(path, loop, loop.call(opening.__aenter__()))
        try:
            yield vm
        finally:
            loop.call(opening.__aexit__(None, None, None))


class Vm:
    """A VM with an open monitor; made by :func:`connect`.

    ``name``, ``pid``, ``qemu``, the calls and their errors are those of `qmpballoon.Vm`. A call blocks
    its thread; several threads may call at the same time. A call that is interrupted (Ctrl-C, an alarm)
    leaves the connection usable. After the end of the ``with`` block each call raises ConnectionLost.
    """

    def __init__(self, path: str, loop: LoopThread, vm: api.Vm) -> None:
        self.name = vm.name
        self.pid = vm.pid
        self.qemu = vm.qemu
        self._path = path
        self._loop = loop
        self._vm = vm

    def state(self, *, fresh_s: float = 3.0) -> VmState:
        """Return the VM's state with fresh guest statistics, for which it waits up to ``fresh_s``.

        Raises:
            NoBalloon: the VM has no balloon device.
        """
        return self._call(self._vm.state(fresh_s=fresh_s))

    def driver_up(self) -> bool | None:
        """Tell whether the guest's balloon driver is up; None if QEMU cannot report it.

        Raises:
            NoBalloon: the VM has no balloon device.
        """
        return self._call(self._vm.driver_up())

    @property
    def has_reported(self) -> bool:
        """Whether the guest has sent statistics since QEMU started; False before ``state``."""
        return self._vm.has_reported

    def ready(self, *, timeout_s: float) -> VmState:
        """Wait until the guest's balloon driver is up and has sent a fresh sample; return that state.

        Raises:
            NotReady: not within ``timeout_s``; the message names what is missing.
            NoBalloon: the VM has no balloon device.
        """
        return self._call(self._vm.ready(timeout_s=timeout_s))

    def set_target(self, size: Size, *, wait_s: float | None = None) -> int:
        """Set the balloon target and return it in bytes; with ``wait_s``, when it is reached.

        Raises:
            InvalidSize, OutOfRange: not a size, or not a possible one for this VM.
            NotReached: not reached within ``wait_s``; the target stays.
            NoBalloon: the VM has no balloon device.
        """
        asked = self._call(self._vm._ask(size))
        if asked.danger is not None:
            warnings.warn(asked.danger, api.DangerousTarget, stacklevel=2)
        if wait_s is not None:
            self._call(self._vm._wait_reached(asked, wait_s))
        return asked.target

    @contextmanager
    def squeeze(self, size: Size, *, wait_s: float = 10.0) -> Iterator[int]:
        """Set the target, wait until it is reached, and set it back at the end, as `qmpballoon.Vm.squeeze`.

        Raises:
            NotReached: not reached within ``wait_s``.
            The errors of `set_target`.
        """
        squeezing = self._vm.squeeze(size, wait_s=wait_s)
        target = self._call(squeezing.__aenter__())
        try:
            yield target
        except BaseException as error:
            with suppress(ConnectionLost):  # of a call after the end of the connection
                if self._call(squeezing.__aexit__(type(error), error, error.__traceback__)):
                    return
            raise
        self._call(squeezing.__aexit__(None, None, None))

    def wait_for(self, condition: Callable[[VmState], bool], *, timeout_s: float) -> VmState:
        """Wait until ``condition`` holds for the VM's state and return that state.

        ``condition`` is called on the connection's own thread; it may not call this VM.

        Raises:
            NotReached: not within ``timeout_s``; ``.state`` is the last state.
        """
        return self._call(self._vm.wait_for(condition, timeout_s=timeout_s))

    def events(self) -> Iterator[Event]:
        """Iterate over the events since connect; ends with ConnectionLost.

        A reader that is too slow gets one event ``lagged`` instead of those missed: ``{"missed": N}``.
        """
        events = self._vm.events()
        while True:
            yield self._call(_next_of(events))

    # ── private ──────────────────────────────────────────────────────────────────────────────────

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.call(coroutine)
        except LoopClosed:
            raise ConnectionLost(f"{self._path}: closed by us") from None


async def _next_of(events: AsyncIterator[Event]) -> Event:
    return await anext(events)
