"""Query, set and wait for the balloons of QEMU guests, over their monitors; no libvirt needed.

::

    async with qmpballoon.connect("/run/web1.qmp") as vm:
        await vm.ready(timeout_s=30)
        await vm.set_target("256MiB", wait_s=10)
        print((await vm.state()).guest.available)

The command ``qmpballoon agent`` controls many VMs automatically, with state and requests over MQTT.
"""

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
