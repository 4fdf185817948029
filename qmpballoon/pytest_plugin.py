"""Fixtures for tests that run QEMU, which pytest finds by itself (entry point ``pytest11``).

::

    def test_the_guest_survives_a_squeeze(qemu_vm, balloon_connect):
        vm = balloon_connect(qemu_vm())
        vm.ready(timeout_s=30)
        with vm.squeeze("96MiB"):
            assert vm.state().guest.available > 0

Loading this module imports nothing more of the package; the fixtures do when they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    import os

    from qmpballoon import sync
    from qmpballoon.lab.vms import QemuVm
    from qmpballoon.opening import Process
    from qmpballoon.units import Size


class BalloonConnect(Protocol):
    """What the fixture `balloon_connect` is."""

    def __call__(
        self,
        socket: str | os.PathLike[str],
        *,
        timeout_s: float = 5.0,
        process: Process | None = None,
        allow_remote: bool = False,
    ) -> sync.Vm:
        """Open a monitor as `qmpballoon.sync.connect` does; it is closed at the end of the test."""


class StartQemuVm(Protocol):
    """What the fixture `qemu_vm` is."""

    def __call__(
        self,
        *command: str | os.PathLike[str],
        name: str | None = None,
        memory: Size = "128MiB",
        driver: bool = True,
        deflate_on_oom: bool = False,
        fresh: bool = False,
        arguments: Sequence[str] = (),
        machine: str | None = None,
        qemu: str | os.PathLike[str] | None = None,
    ) -> QemuVm:
        """Start a QEMU as `qmpballoon.lab.vms.QemuVms.start` does; it is killed at the end of the test."""


@pytest.fixture
def balloon_connect() -> Iterator[BalloonConnect]:
    """Open QEMU's monitors: ``balloon_connect(socket, *, timeout_s=5.0)`` returns a `qmpballoon.sync.Vm`.

    All are closed at the end of the test, also if their QEMUs were killed. It works in tests of
    pytest-asyncio, too; its calls block.
    """
    from contextlib import ExitStack

    from qmpballoon import sync

    with ExitStack() as stack:

        def connect(
            socket: str | os.PathLike[str],
            *,
            timeout_s: float = 5.0,
            process: Process | None = None,
            allow_remote: bool = False,
        ) -> sync.Vm:
            opening = sync.connect(socket, timeout_s=timeout_s, process=process, allow_remote=allow_remote)
            return stack.enter_context(opening)

        yield connect


@pytest.fixture
def qemu_vm() -> Iterator[StartQemuVm]:
    """Start QEMUs: ``qemu_vm()`` a small Linux guest, ``qemu_vm("qemu-system-x86_64", …)`` your own.

    The result is a `qmpballoon.lab.vms.QemuVm`. All are killed at the end of the test, and by the kernel if
    the test process ends in any other way.
    """
    from qmpballoon.lab.vms import QemuVms

    with QemuVms() as vms:
        yield vms.start
