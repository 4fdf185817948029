"""Query, set and wait for the balloons of QEMU guests, over their monitors; no libvirt needed.

::

    async with qmpballoon.connect("/run/web1.qmp") as vm:
        await vm.ready(timeout_s=30)
        await vm.set_target("256MiB", wait_s=10)
        print((await vm.state()).guest.available)

The command ``qmpballoon agent`` controls many VMs automatically, with state and requests over MQTT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qmpballoon import sync as sync
    from qmpballoon.api import DangerousTarget as DangerousTarget
    from qmpballoon.api import Vm, connect
    from qmpballoon.errors import (
        ConnectionLost,
        InvalidSize,
        MonitorBusy,
        NoBalloon,
        NotReached,
        NotReady,
        OutOfRange,
        QmpBalloonError,
        QmpError,
        Unreachable,
    )
    from qmpballoon.model.records import Event, GuestStats, VmState
    from qmpballoon.units import Size, parse_size

__version__ = "0.1.0"

__all__ = [
    "ConnectionLost",
    "Event",
    "GuestStats",
    "InvalidSize",
    "MonitorBusy",
    "NoBalloon",
    "NotReached",
    "NotReady",
    "OutOfRange",
    "QmpBalloonError",
    "QmpError",
    "Size",
    "Unreachable",
    "Vm",
    "VmState",
    "connect",
    "parse_size",
]

_PLACES: Final = {  # imported when first used: the pytest plugin of this package is loaded in every run
    "qmpballoon.api": "DangerousTarget Vm connect",
    "qmpballoon.errors": """
        ConnectionLost InvalidSize MonitorBusy NoBalloon NotReached NotReady OutOfRange QmpBalloonError
        QmpError Unreachable
    """,
    "qmpballoon.model.records": "Event GuestStats VmState",
    "qmpballoon.units": "Size parse_size",
}
_MODULE_OF: Final = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name == "sync":
        return importlib.import_module("qmpballoon.sync")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qmpballoon' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "sync"})
