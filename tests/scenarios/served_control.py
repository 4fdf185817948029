"""The control socket of an agent in the loop of the test, and commands that use it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent_harness import PATIENCE_S, AgentHarness

from qmpballoon.agent.control import ControlSocket
from qmpballoon.cli.program import main
from qmpballoon.model.names import VmId


def control_of(harness: AgentHarness, path: Path, pid: int | None = None) -> ControlSocket:
    return ControlSocket(
        str(path),
        harness.service.handle,
        harness.context.feed,
        host="edge-7",
        vm_exists=lambda vm: harness.registry.get(VmId(vm)) is not None,
        describe=lambda: {
            "host": "edge-7",
            "version": "1",
            "pid": pid or os.getpid(),
            "vms": [
                {"vm": vm.id, "name": vm.name, "socket": vm.socket, "health": vm.health}
                for vm in (vm.status for vm in harness.registry)
            ],
            "unidentified": [path for path, _ in harness.supervisor.unidentified],
        },
        statuses=lambda: [vm.status for vm in harness.registry],
        clock=time.monotonic,
    )


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
