"""A simulated QEMU for tests that block: it runs on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qmpballoon.loop_thread import LoopThread
from qmpballoon.sim.qemu.server import SimulatedQemu

T = TypeVar("T")


class SimulatedVm:
    """A simulated QEMU, and the thread that it runs on."""

    def __init__(self, qemu: SimulatedQemu, loop: LoopThread) -> None:
        self.path = qemu.path
        self._qemu = qemu
        self._loop = loop

    def look(self, read: Callable[[SimulatedQemu], T]) -> T:
        """Return what a function returns that is called on the QEMU's thread."""

        async def called() -> T:
            return read(self._qemu)

        return self._loop.call(called())

    def die(self) -> None:
        """Let the QEMU end as if it were killed."""
        self.look(SimulatedQemu.die)

    def polling_interval_s(self) -> int:
        """Return how often QEMU asks the guest for statistics."""
        return self.look(lambda qemu: qemu.guest.polling_interval_s)


@contextmanager
def simulated(path: Path, **how: Any) -> Iterator[SimulatedVm]:
    """Run a simulated QEMU; the arguments are those of `SimulatedQemu`."""
    with LoopThread("simulated QEMU") as loop:
        qemu = SimulatedQemu(path, **how)
        loop.call(qemu.__aenter__())
        try:
            yield SimulatedVm(qemu, loop)
        finally:
            loop.call(qemu.__aexit__(None, None, None))
