"""The interface of a device that changes how much memory a guest has.

The virtio balloon is the first (`qmpballoon.qmp.balloon.VirtioBalloon`). virtio-mem would be another one: it
plugs and unplugs blocks, has a coarser granularity, and reports the size that it reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DriverState:
    """What QEMU knows of the guest's driver for the device."""

    up: bool
    deflates_on_oom: bool = False  # negotiated: the guest takes memory back by itself when it runs out
    reports: bool = True  # negotiated: it sends statistics


class Resizer(Protocol):
    """One such device of one VM, over one session. Sizes are bytes.

    Every call may raise ConnectionLost, when the session ends meanwhile.
    """

    @property
    def granularity(self) -> int:
        """Targets are rounded up to multiples of this."""
        ...

    @property
    def asked(self) -> int | None:
        """The last target that was asked for over this session; a device may not tell an earlier one."""
        ...

    async def actual(self) -> int:
        """Return what the guest has now.

        Raises:
            QmpError: the device is gone.
        """
        ...

    async def driver(self) -> DriverState | None:
        """Return the state of the guest's driver; None where QEMU does not tell."""
        ...

    async def look(self) -> tuple[int, DriverState | None]:
        """Return `actual` and `driver`, asked for together; the errors of `actual`."""
        ...

    async def ask(self, target: int) -> None:
        """Set the target in bytes. It returns when QEMU accepted it; the guest follows later or not at all.

        Raises:
            QmpError: QEMU refused it.
        """
        ...
