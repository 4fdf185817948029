"""Every metric: its name, type and value; and the text that Prometheus reads.

Names and units follow Prometheus' conventions: base units (bytes, seconds, ratios), counters end in
``_total``. A figure that is not known has no sample, never 0. Labels have few values: words that are fixed,
and names of VMs.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, TypeAlias

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector

from qmpballoon import __version__
from qmpballoon.metrics.tally import EMERGENCY, LAG_BUCKETS_S, Tally
from qmpballoon.model.records import HEALTH_WORDS, LEVELS, GuestStats, HostStatus, VmStatus

VMS_AT_ONCE: Final = 250  # then other tasks run: this takes about 1 ms


@dataclass(frozen=True, slots=True)
class Reading:
    """What a scrape reads, once: the records of all VMs as they were, and the tally.

    ``broker_connected`` None: no broker is configured. ``now_s`` is monotonic.
    """

    vms: Sequence[VmStatus]
    tally: Tally
    broker_connected: bool | None
    now_s: float


OfVm: TypeAlias = Callable[[VmStatus, Reading], float | None]
OfHost: TypeAlias = Callable[[HostStatus], float | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of every VM; ``is_counter``: it only grows until QEMU or the agent is started again."""

    name: str
    about: str
    value: OfVm
    is_counter: bool = False


def _of_guest(read: Callable[[GuestStats], int | None]) -> OfVm:
    return lambda vm, now: None if vm.sample is None else read(vm.sample.stats)


VM_ROWS: Final = (
    Row("vm_up", "Whether the VM's monitor answers.", lambda vm, now: vm.answers),
    Row("vm_healthy", "Whether the VM's health is ok.", lambda vm, now: vm.health == "ok"),
    Row(
        "vm_automatic",
        "Whether the policy moves the VM: its mode is auto.",
        lambda vm, now: vm.mode == "auto",
    ),
    Row("vm_size_bytes", "Memory that the guest has with an empty balloon.", lambda vm, now: vm.size),
    Row("vm_actual_bytes", "Memory that the guest has: size minus balloon.", lambda vm, now: vm.actual),
    Row("vm_target_bytes", "The last actual that was asked for.", lambda vm, now: vm.target),
    Row("vm_floor_bytes", "The least that is ever asked for.", lambda vm, now: vm.limits.floor),
    Row("vm_ceiling_bytes", "The most that is ever asked for.", lambda vm, now: vm.limits.ceiling),
    Row("vm_shares", "Relative claim when memory is short.", lambda vm, now: vm.limits.shares),
    Row("vm_rss_bytes", "Resident memory of the VM's QEMU process.", lambda vm, now: vm.rss),
    Row(
        "vm_held_bytes",
        "What the guest cannot give without reclaim or kills: actual minus available.",
        lambda vm, now: None if vm.sample is None else vm.sample.held,
    ),
    Row(
        "vm_guest_memory_bytes",
        "Memory that the guest's kernel counts.",
        _of_guest(lambda guest: guest.total),
    ),
    Row(
        "vm_guest_available_bytes",
        "Memory that the guest can allocate without reclaim; the free bytes where it does not report that.",
        lambda vm, now: None if vm.sample is None else vm.sample.available,
    ),
    Row("vm_guest_free_bytes", "Memory of the guest that nothing uses.", _of_guest(lambda guest: guest.free)),
    Row("vm_guest_caches_bytes", "The guest's page cache.", _of_guest(lambda guest: guest.caches)),
    Row(
        "vm_guest_swap_in_bytes_total",
        "Bytes that the guest has read from its swap space.",
        _of_guest(lambda guest: guest.swap_in),
        is_counter=True,
    ),
    Row(
        "vm_guest_swap_out_bytes_total",
        "Bytes that the guest has written to its swap space.",
        _of_guest(lambda guest: guest.swap_out),
        is_counter=True,
    ),
    Row(
        "vm_guest_major_faults_total",
        "Page faults of the guest that needed its disk.",
        _of_guest(lambda guest: guest.major_faults),
        is_counter=True,
    ),
    Row(
        "vm_guest_oom_kills_total",
        "Processes that the guest's kernel has killed for lack of memory (Linux 6.12, QEMU 9.2).",
        _of_guest(lambda guest: guest.oom_kills),
        is_counter=True,
    ),
    Row(
        "vm_sample_age_seconds",
        "Time since the guest's statistics were seen to change.",
        lambda vm, now: None if vm.sample is None else max(0.0, now.now_s - vm.sample.seen_at_s),
    ),
    Row(
        "vm_emergencies_total",
        "Targets that were sent because the guest was about to run out of memory.",
        lambda vm, now: now.tally.emergencies.get(vm.id, 0),
        is_counter=True,
    ),
)
"""Of each VM; names without ``qmpballoon_``."""

HOST_ROWS: Final[tuple[tuple[str, str, OfHost], ...]] = (
    ("host_budget_bytes", "What all VMs together may hold.", lambda host: host.budget),
    ("host_reserve_bytes", "Host memory that is kept free at all times.", lambda host: host.reserve),
    ("host_used_bytes", "What the VMs are charged against the budget.", lambda host: host.used),
    ("host_budget_available_bytes", "Budget that no VM is charged for.", lambda host: host.available),
    ("host_room_bytes", "How large a new VM may be now.", lambda host: host.room),
    ("host_reclaimable_bytes", "What idle guests could give.", lambda host: host.reclaimable),
    ("host_on_hold_bytes", "What reclaim keeps free for those who asked.", lambda host: _on_hold(host)),
    ("host_memory_bytes", "Memory of the host, or of the cgroup of the VMs.", lambda host: host.mem_total),
    ("host_memory_available_bytes", "Memory that the host can allocate.", lambda host: host.mem_available),
    (
        "host_stall_some_ratio",
        "Share of the last 10 s in which some tasks waited for memory (PSI).",
        lambda host: _ratio(host.psi_some_avg10),
    ),
    (
        "host_stall_full_ratio",
        "Share of the last 10 s in which all tasks waited for memory (PSI).",
        lambda host: _ratio(host.psi_full_avg10),
    ),
    ("host_alarms", "Alarms that have begun and not ended.", lambda host: len(host.alarms)),
    (
        "host_unidentified_sockets",
        "Sockets that match a glob and have never answered.",
        lambda host: len(host.unidentified),
    ),
    (
        "sampling_late_seconds",
        "How late VMs are polled at most; 0: in time.",
        lambda host: host.sampling_late_s,
    ),
)
"""Of the host; names without ``qmpballoon_``."""


def families(reading: Reading) -> Iterator[Metric]:
    """Yield every metric but those of the VMs."""
    tally, host = reading.tally, reading.tally.host
    yield InfoMetricFamily(
        "qmpballoon_build",
        "The version of the agent and of Python.",
        {"version": __version__, "python": platform.python_version()},
    )
    if host is not None:
        yield InfoMetricFamily(
            "qmpballoon_policy", "The host's policy and mode.", {"name": host.policy, "mode": host.mode}
        )
        level = GaugeMetricFamily(
            "qmpballoon_host_level", "How short memory is: 1 for the level now.", labels=("level",)
        )
        for word in LEVELS:
            level.add_metric((word,), word == host.level)
        yield level
        for name, about, value in HOST_ROWS:
            yield _gauge(f"qmpballoon_{name}", about, value(host))
        yield _gauge("qmpballoon_tick_age_seconds", "Time since the last tick was done.", tally.host_age_s)
    if reading.broker_connected is not None:
        about = "Whether the MQTT broker is connected."
        yield _gauge("qmpballoon_broker_connected", about, reading.broker_connected)
    by_health = dict.fromkeys(HEALTH_WORDS, 0)
    for vm in reading.vms:
        by_health[vm.health] += 1
    vms = GaugeMetricFamily("qmpballoon_vms", "VMs by health.", labels=("health",))
    for word, number in by_health.items():
        vms.add_metric((word,), number)
    yield vms
    decisions = CounterMetricFamily(
        "qmpballoon_decisions",
        "Targets decided, by reason: sent, or only observed (the mode is observe).",
        labels=("why", "outcome"),
    )
    for key, number in sorted({(EMERGENCY, "sent"): 0, **tally.decisions}.items()):
        decisions.add_metric(key, number)
    yield decisions
    requests = CounterMetricFamily(
        "qmpballoon_requests",
        "Requests answered, by verb and outcome: ok, or an error word.",
        labels=("verb", "outcome"),
    )
    for key, number in sorted(tally.answers.items()):
        requests.add_metric(key, number)
    yield requests
    yield HistogramMetricFamily(
        "qmpballoon_loop_lag_seconds",
        "How late the agent's event loop was, once a second.",
        buckets=_cumulative(tally.lag.counts),
        sum_value=tally.lag.sum_s,
    )
    yield from ProcessCollector(registry=None).collect()


async def exposition(reading: Reading) -> bytes:
    """Return all metrics in the text format, version 0.0.4; other tasks run while it is made."""
    parts = [_text(family) for family in families(reading) if family.samples]
    await asyncio.sleep(0)
    for row in VM_ROWS:
        has_head = False
        for first in range(0, len(reading.vms), VMS_AT_ONCE):
            family = _vm_family(row, reading.vms[first : first + VMS_AT_ONCE], reading)
            if family.samples:
                text = _text(family)
                parts.append(_without_head(text) if has_head else text)
                has_head = True
            await asyncio.sleep(0)
    return b"".join(parts)


def _vm_family(row: Row, vms: Iterable[VmStatus], reading: Reading) -> Metric:
    kind = CounterMetricFamily if row.is_counter else GaugeMetricFamily
    family = kind(f"qmpballoon_{row.name}", row.about, labels=("vm",))
    for vm in vms:
        value = row.value(vm, reading)
        if value is not None:
            family.add_metric((vm.id,), value)
    return family


def _gauge(name: str, about: str, value: float | None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about)
    if value is not None:
        family.add_metric((), value)
    return family


@dataclass(frozen=True, slots=True)
class _One:
    """A collector of one metric."""

    family: Metric

    def collect(self) -> Iterable[Metric]:
        return (self.family,)


def _text(family: Metric) -> bytes:
    return generate_latest(_One(family))


def _without_head(text: bytes) -> bytes:
    """Cut the two lines HELP and TYPE off: a metric has them once."""
    return text.split(b"\n", 2)[2]


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    bounds = [*map(str, LAG_BUCKETS_S), "+Inf"]
    return list(zip(bounds, map(float, accumulate(counts)), strict=True))


def _on_hold(host: HostStatus) -> int:
    return sum(size for hold in host.holds if isinstance(size := hold.get("size"), int))


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
