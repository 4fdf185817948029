"""What a socket of a QEMU is for, by its command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpballoon.qmp.purpose import purpose_in, purpose_of

PLACE = "/run/x.sock"
PORT = "virtserialport,chardev=c0,name="


@pytest.mark.parametrize(
    ("words", "purpose"),
    [
        (f"-spice unix=on,addr={PLACE},disable-ticketing=on", "a SPICE server"),
        (f"--spice addr={PLACE},unix=on", "a SPICE server"),
        (f"-serial unix:{PLACE},server=on,wait=off", "a serial console"),
        (f"-monitor unix:{PLACE},server", "QEMU's human monitor"),
        (f"-vnc unix:{PLACE}", "a VNC server"),
        (f"-gdb unix:{PLACE},server=on", "the stub of a debugger"),
        (f"-qmp unix:{PLACE},server=on", None),
        (
            f"-chardev socket,id=c0,path={PLACE} -device {PORT}org.qemu.guest_agent.0",
            "the channel of a guest agent",
        ),
        (
            f"-device {PORT}com.redhat.spice.0 -chardev socket,path={PLACE},id=c0",
            "the socket of the device virtserialport (port com.redhat.spice.0)",
        ),
        (f"-chardev socket,id=c0,path={PLACE} -device virtconsole,chardev=c0", "a serial console"),
        (f"-chardev socket,id=c0,path={PLACE} -serial chardev:c0", "a serial console"),
        (f"-chardev socket,id=c0,path={PLACE} -mon chardev=c0", "QEMU's human monitor"),
        (f"-chardev socket,id=c0,path={PLACE} -mon chardev=c0,mode=control", None),
        (
            f"-chardev socket,id=c0,path={PLACE} -device vhost-user-fs-pci,chardev=c0,tag=root",
            "the socket of the device vhost-user-fs-pci",
        ),
        (f"-chardev socket,id=c0,path={PLACE} -device \x1b[2J,chardev=c0", None),
        (f"-chardev socket,id=c0,path={PLACE}", None),
        (f"-chardev socket,path={PLACE} -device virtconsole,chardev=", None),
        ("-chardev socket,id=c0,path=/run/other.sock -serial chardev:c0", None),
        (f"-name {PLACE}", None),
        ("-spice", None),
        ("", None),
    ],
)
def test_the_option_that_has_the_path_tells(words: str, purpose: str | None) -> None:
    assert purpose_in(["qemu-system-x86_64", *words.split(" "), ""], PLACE.__eq__) == purpose


def test_a_process_that_has_ended_or_is_no_qemu_tells_nothing(tmp_path: Path) -> None:
    assert purpose_of(2**22 + 1, str(tmp_path)) is None
    assert purpose_of(os.getpid(), str(tmp_path)) is None
