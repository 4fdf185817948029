"""Differences between the replies of QEMU versions: a row for each recorded version.

The recordings are in ``tests/contract/recordings``. The contract tests compare both the simulated QEMU and
the installed one with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Final


class VirtioStatus(Enum):
    """How ``x-query-virtio-status`` behaves for a virtio device."""

    UNKNOWN = auto()  # no such command
    ANSWERED = auto()
    ABORTS = auto()  # an assertion fails in QEMU, which ends by SIGABRT


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The replies of QEMU from one version up to the next one that is listed."""

    unknown_capability: str  # the error text, with ``{}`` for the name
    statistics_read_only: str  # the error text
    refused_size: str  # the name of the parameter in the error of a refused ``balloon``
    statistics: tuple[str, ...]  # names, in QEMU's order
    has_singlestep: bool  # in query-status
    tells_shared: bool  # and reserve, in query-memdev
    error_positions: bool  # JSON errors start with line and column in the whole input of the client
    events_after_reply: frozenset[str]  # commands whose events come after their reply
    virtio_status: VirtioStatus
    virtio_device: str  # the type in the errors of x-query-virtio-status
    offered_transports: tuple[str, ...]


_STATISTICS: Final = (
    "stat-htlb-pgalloc",
    "stat-swap-out",
    "stat-available-memory",
    "stat-htlb-pgfail",
    "stat-free-memory",
    "stat-minor-faults",
    "stat-major-faults",
    "stat-total-memory",
    "stat-swap-in",
    "stat-disk-caches",
)
_STATISTICS_SINCE_9_2: Final = (
    "stat-htlb-pgalloc",
    "stat-swap-out",
    "stat-alloc-stalls",
    "stat-available-memory",
    "stat-direct-reclaims",
    "stat-direct-scans",
    "stat-htlb-pgfail",
    "stat-free-memory",
    "stat-minor-faults",
    "stat-major-faults",
    "stat-total-memory",
    "stat-oom-kills",
    "stat-async-reclaims",
    "stat-swap-in",
    "stat-async-scans",
    "stat-disk-caches",
)
_TRANSPORTS: Final = (
    "VIRTIO_RING_F_EVENT_IDX: Used & avail. event fields enabled",
    "VIRTIO_RING_F_INDIRECT_DESC: Indirect descriptors supported",
    "VIRTIO_F_VERSION_1: Device compliant for v1 spec (legacy)",
    "VIRTIO_F_ANY_LAYOUT: Device accepts arbitrary desc. layouts",
    "VIRTIO_F_NOTIFY_ON_EMPTY: Notify when device runs out of avail. descs. on VQ",
)

_5_2: Final = Dialect(
    unknown_capability="Invalid parameter '{}'",
    statistics_read_only="Insufficient permission to perform this operation",
    refused_size="target",
    statistics=_STATISTICS,
    has_singlestep=True,
    tells_shared=False,
    error_positions=False,
    events_after_reply=frozenset({"system_reset", "quit"}),
    virtio_status=VirtioStatus.UNKNOWN,
    virtio_device="VirtIODevice",
    offered_transports=_TRANSPORTS,
)
_7_2: Final = replace(
    _5_2,
    unknown_capability="Parameter 'null' does not accept value '{}'",
    statistics_read_only="Property 'virtio-balloon-device.guest-stats' is not writable",
    tells_shared=True,
    events_after_reply=frozenset(),
    virtio_status=VirtioStatus.ANSWERED,
)
_10_0: Final = replace(
    _7_2,
    refused_size="value",
    statistics=_STATISTICS_SINCE_9_2,
    has_singlestep=False,
    virtio_device="realized VirtIODevice",
    offered_transports=(
        *_TRANSPORTS[:2],
        "VIRTIO_F_RING_RESET: Driver can reset a queue individually",
        *_TRANSPORTS[2:],
    ),
)
_11_1: Final = replace(_10_0, error_positions=True, virtio_status=VirtioStatus.ABORTS)

DIALECTS: Final[Mapping[tuple[int, int], Dialect]] = MappingProxyType(
    {(5, 2): _5_2, (7, 2): _7_2, (10, 0): _10_0, (11, 1): _11_1}
)
"""By major and minor version, oldest first."""


def dialect_of(version: tuple[int, ...]) -> Dialect:
    """Return the dialect of a version: the newest listed one that is not newer, else the oldest."""
    found = _5_2
    for since, dialect in DIALECTS.items():
        if since <= version:
            found = dialect
    return found
