"""Sockets of QEMU that are no QMP monitors: the error names what each is."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmpballoon
from qmpballoon.lab.lab import Lab


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (["-monitor", "unix:{},server=on,wait=off"], qmpballoon.ConnectionLost, "QEMU's human monitor"),
        (["-serial", "unix:{},server=on,wait=off"], qmpballoon.Unreachable, "this is a serial console"),
        (["-vnc", "unix:{}"], qmpballoon.ConnectionLost, "a VNC server"),
        (
            ["-spice", "unix=on,addr={},disable-ticketing=on"],
            qmpballoon.Unreachable,
            "this is a SPICE server, not a QMP monitor",
        ),
        (
            [
                "-chardev",
                "socket,id=agent,path={},server=on,wait=off",
                "-device",
                "virtio-serial",
                "-device",
                "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            ],
            qmpballoon.Unreachable,
            "this is the channel of a guest agent",
        ),
    ],
    ids=["human-monitor", "console", "vnc", "spice", "guest-agent"],
)
async def test_a_socket_that_is_no_monitor_is_named(
    options: list[str],
    error: type[qmpballoon.QmpBalloonError],
    sentence: str,
    lab: Lab,
    sockets_dir: Path,
) -> None:
    path = sockets_dir / "other.sock"
    await lab.empty_qemu("web", paused=False, arguments=[option.format(path) for option in options])
    with pytest.raises(error, match=sentence):
        async with qmpballoon.connect(path, timeout_s=0.5):
            pass
