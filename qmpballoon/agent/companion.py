"""The end of the one QEMU that an agent accompanies: ``qmpballoon agent --vm SOCKET`` ends with it."""

from __future__ import annotations

import asyncio
from typing import Final

from qmpballoon.agent.registry import Registry
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.log import log_event
from qmpballoon.model.records import Life
from qmpballoon.procfs import has_ended

LOOK_S: Final = 0.25
UNSEEN_ENDED_S: Final = 2.0  # without a listener, where no process tells (another pid namespace, TCP)


async def until_qemu_ended(registry: Registry) -> None:
    """Wait for the QEMU to answer, however long that takes, and then for its end."""
    served: ManagedVm | None = None
    life: Life | None = None
    while served is None or not _is_over(served, life):
        vm = next(iter(registry), None)
        if served is None and vm is not None and vm.run.qemu is not None:  # it has answered
            served, life = vm, vm.run.life
        await asyncio.sleep(LOOK_S)
    log_event("qemu-ended", "the agent ends with it", vm=served.id, life=life)


def _is_over(vm: ManagedVm, life: Life | None) -> bool:
    if life is not None:
        return has_ended(life)
    return vm.connection == "offline" and vm.silent_for_s >= UNSEEN_ENDED_S
