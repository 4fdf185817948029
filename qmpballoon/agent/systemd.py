"""Notifications to systemd of a ``Type=notify`` service. Source: sd_notify(3)."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from contextlib import suppress

from qmpballoon.descriptors import with_reserve


def notify(*states: str) -> None:
    """Send states such as ``READY=1`` to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return

    def send() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto("\n".join(states).encode(), re.sub("^@", "\0", address))

    with suppress(OSError):
        with_reserve(send)


def reloading() -> None:
    """Notify that the configuration is being reloaded; READY=1 ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


async def feed_watchdog() -> None:
    """Send watchdog keep-alives from the loop, twice as often as systemd requires; never returns."""
    try:
        interval_s = int(os.environ.get("WATCHDOG_USEC", "")) / 2e6
    except ValueError:
        return
    if interval_s <= 0 or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
