"""A real monitor with pretty=on, as Kata's -qmp-pretty option makes it."""

from __future__ import annotations

from pathlib import Path

from qmpballoon.api import connect
from qmpballoon.lab.lab import Lab


async def test_a_monitor_with_pretty_on_is_served(lab: Lab, sockets_dir: Path) -> None:
    path = sockets_dir / "pretty.sock"
    chardev = f"socket,id=pretty,path={path},server=on,wait=off"
    arguments = ("-chardev", chardev, "-mon", "chardev=pretty,mode=control,pretty=on")
    guest = await lab.guest("web", fresh=True, arguments=arguments)
    async with connect(path) as vm:
        state = await vm.ready(timeout_s=30)
        assert (vm.pid, state.size) == (guest.pid, guest.memory)
        assert await vm.set_target(guest.memory - 16 * 1024**2, wait_s=30) == guest.memory - 16 * 1024**2
