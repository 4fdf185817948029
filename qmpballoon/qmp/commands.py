"""Every command and property that the program ever sends to a QEMU, and why. Pure.

The table is closed: a session refuses to send what is not in it. An unstable command (``x-…``, or one that
QEMU's schema calls unstable) may change or fail in any release, and one of them aborts QEMU 11.1. It is
sent only to the versions in ``tried``, on which a test has sent it; elsewhere stable means are used.

``since`` is the first QEMU that has it, by the ``Since`` notes of QEMU's QAPI schema and its release notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Sent:
    """One command, or one access to a property of the balloon device, that may be sent."""

    name: str  # "query-balloon"; "qom-get guest-stats" for a property
    why: str
    since: str
    tried: frozenset[str] | None = None  # versions that an unstable command is sent to; None: it is stable

    @property
    def stability(self) -> str:
        """``stable``, or ``unstable`` with the versions that it is sent to."""
        return "stable" if self.tried is None else f"unstable: sent to {', '.join(sorted(self.tried))} only"


DRIVER_STATUS: Final = "x-query-virtio-status"
QUEUE_STATUS: Final = "x-query-virtio-queue-status"
_PROPERTY_COMMANDS: Final = ("qom-get", "qom-set")

_TABLE: Final = (
    Sent("qmp_capabilities", "ends the greeting; without it a monitor takes no other command", "0.13"),
    Sent("query-name", "the VM's name, as given by -name", "0.14"),
    Sent("query-uuid", "the VM's UUID, as given by -uuid", "0.14"),
    Sent("query-status", "whether the guest runs, is paused or arrives by migration", "0.14"),
    Sent("query-migrate", "whether it is being migrated: its balloon is left alone then", "0.14"),
    Sent("query-memory-size-summary", "the base memory, and whether any is plugged", "2.11"),
    Sent("query-memory-devices", "the size of plugged DIMMs; sent only when memory is plugged", "2.1"),
    Sent("qom-list", "finds the balloon device; for doctor also vfio devices and memory backends", "1.2"),
    Sent("query-balloon", "actual: what the guest has left", "0.14"),
    Sent("balloon", "sets the target; the only command that changes a guest", "0.14"),
    Sent("qom-get guest-stats", "the guest's memory statistics", "1.5"),
    Sent(
        "qom-get guest-stats-polling-interval",
        "the interval as found; the library restores it",
        "1.5",
    ),
    Sent("qom-set guest-stats-polling-interval", "how often QEMU asks the guest; 0 and back asks now", "1.5"),
    Sent("qom-get deflate-on-oom", "whether the guest may take memory back by itself", "2.4"),
    Sent("qom-get free-page-reporting", "whether the guest may report free pages; for doctor", "5.1"),
    Sent("query-memdev", "whether memory is shared or preallocated; for doctor", "2.1"),
    Sent("qom-get hugetlb", "whether a memfd has huge pages; for doctor", "2.12"),
    Sent("qom-get mem-path", "the file behind memory: perhaps of huge pages; for doctor", "2.1"),
    Sent(
        DRIVER_STATUS,
        "whether the guest's driver is up, and the features that it negotiated",
        "7.2",
        tried=frozenset({"7.2.22", "10.0.2", "10.0.13"}),
    ),
    Sent(
        QUEUE_STATUS,
        "how many samples a calm guest has sent: whether new ones have the figures of the last",
        "7.2",
        tried=frozenset({"7.2.22", "10.0.13", "11.1.3"}),
    ),
)

COMMANDS: Final[Mapping[str, Sent]] = MappingProxyType({sent.name: sent for sent in _TABLE})
"""By name."""


class NeverSent(LookupError):
    """A command that is not in the table, or not for this QEMU, was about to be sent: a bug here."""


def may_be_sent(name: str, version: str) -> bool:
    """Tell whether a command of the table may be sent to a QEMU of this version (``7.2.22``)."""
    sent = COMMANDS.get(name)
    return sent is not None and (sent.tried is None or version in sent.tried)


def check(command: str, arguments: Mapping[str, object] | None, version: str) -> None:
    """Refuse what the table does not name.

    Raises:
        NeverSent: it is not in the table, or it is unstable and this version is not among those tried.
    """
    name = f"{command} {(arguments or {}).get('property')}" if command in _PROPERTY_COMMANDS else command
    if not may_be_sent(name, version):
        raise NeverSent(f"{name} is not to be sent to QEMU {version}: see qmpballoon.qmp.commands")
