"""Both kinds of QEMU."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from both_qemus import Qemu, Start, installed_version, running

from qmpballoon.sim.qemu.dialect import Dialect, dialect_of


@pytest.fixture(params=["real", "simulated"])
async def start_qemu(
    request: pytest.FixtureRequest, sockets_dir: Path
) -> AsyncIterator[Callable[[Start], Awaitable[Qemu]]]:
    """Start a QEMU of either kind on one path; the next start takes the same path."""
    async with AsyncExitStack() as stack:

        async def start(how: Start) -> Qemu:
            return await stack.enter_async_context(running(request.param, sockets_dir / "qemu.qmp", how))

        yield start


@pytest.fixture
async def qemu(start_qemu: Callable[[Start], Awaitable[Qemu]]) -> Qemu:
    """A running QEMU of either kind with a balloon device and no driver in its guest."""
    return await start_qemu(Start())


@pytest.fixture
def dialect() -> Dialect:
    """The dialect of the installed QEMU, which the simulated one uses too."""
    return dialect_of(installed_version())
