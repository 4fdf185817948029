"""`watch`: a loss and an interrupt at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from qmpballoon.api import Vm
from qmpballoon.cli.watch import _Watch
from qmpballoon.errors import ConnectionLost
from qmpballoon.model.records import Event, VmState


class Losing:
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
async def test_a_loss_in_the_moment_of_an_interrupt_does_not_hide_it(turns: int) -> None:
    vm = Losing()
    watch = _Watch(vm.path, 1.0, as_json=True, width=1)
    task = asyncio.create_task(watch._until_lost(cast("Vm", vm)), name="watch")
    for _ in range(3):
        await asyncio.sleep(0)
    vm.lost.set()
    for _ in range(turns):  # every moment of the loss, one turn of the loop after the other
        await asyncio.sleep(0)
    was_over = task.done()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() is not was_over
    if was_over:
        assert isinstance(task.exception(), ConnectionLost)
