"""The control socket of an agent in the loop of the test, and commands that use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent_harness import PATIENCE_S, AgentHarness

from qmpballoon.agent.control import ControlSocket
from qmpballoon.cli.program import main
from qmpballoon.model.names import VmId


def control_of(harness: AgentHarness, path: Path, pid: int | None = None) -> ControlSocket:
    control = ControlSocket(
        str(path),
        harness.service.handle,
        harness.context.feed,
        host="edge-7",
        vm_exists=lambda vm: harness.registry.get(VmId(vm)) is not None,
        statuses=lambda: [vm.status for vm in harness.registry],
        unidentified=lambda: [path for path, _ in harness.supervisor.unidentified],
        clock=time.monotonic,
    )
    control.pid = pid or control.pid
    return control


@asynccontextmanager
async def served(harness: AgentHarness, pid: int | None = None) -> AsyncIterator[Path]:
    """Serve the control socket of an agent, which says that it has this pid; its path."""
    path = harness.directory / "agent.sock"
    task = asyncio.create_task(control_of(harness, path, pid).run(), name="control")
    try:
        await harness.until(path.exists)
        yield path
    finally:
        task.cancel()
        await asyncio.wait((task,), timeout=PATIENCE_S)
        assert task.cancelled()
        assert not path.exists()


async def command(*typed: str) -> int:
    return await asyncio.to_thread(main, typed)
