"""A verb in a process of its own that a signal ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable

from agent_harness import PATIENCE_S


async def ended_by(
    number: signal.Signals, *words: str, begun: Callable[[], Awaitable[None]]
) -> tuple[int | None, bytes]:
    """Run a verb, send it a signal when ``begun`` returns, and return its exit code and stderr."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpballoon", *words, "--control="),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            await begun()
            running.send_signal(number)
            _, err = await running.communicate()
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()
    return running.returncode, err
