"""`watch`: a loss and an interrupt at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from qmpballoon.api import Vm
from qmpballoon.cli.watch import _Output, _Watch
from qmpballoon.errors import ConnectionLost
from qmpballoon.model.records import Event, VmState


class LosingVm:
    """A VM whose connection is lost when ``lost`` is set."""

    path = "/run/a.qmp"

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    async def events(self) -> AsyncIterator[Event]:
        await self.lost.wait()
        raise ConnectionLost("gone")
        yield

    async def state(self, **_: Any) -> VmState:
        await self.lost.wait()
        raise ConnectionLost("gone")


@pytest.mark.parametrize("turns", range(8))
async def test_a_loss_at_the_time_of_an_interrupt_does_not_hide_it(turns: int) -> None:
    vm = LosingVm()
    watch = _Watch(vm.path, 1.0, _Output(as_json=True, width=1))
    task = asyncio.create_task(watch._until_lost(cast("Vm", vm)), name="watch")
    for _ in range(3):
        await asyncio.sleep(0)
    vm.lost.set()
    for _ in range(turns):  # one iteration of the loop more per case
        await asyncio.sleep(0)
    had_ended = task.done()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() is not had_ended
    if had_ended:
        assert isinstance(task.exception(), ConnectionLost)
