"""Waits for tasks that must run to their end."""

from __future__ import annotations

import asyncio
from typing import Any


async def until_ended(*tasks: asyncio.Task[Any]) -> None:
    """Wait for tasks to end, also if this one is cancelled meanwhile; it is cancelled after them."""
    cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
