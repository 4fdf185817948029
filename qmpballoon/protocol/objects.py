"""The published objects, exactly with the keys of the contract. Pure.

Every key is always present, and null when unknown. Consumers such as Home Assistant keep the old value
where a key is missing, and treat 0 as a measured value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from os.path import basename
from typing import Final

from qmpballoon.errors import QmpBalloonError
from qmpballoon.model.records import (
    STATISTICS,
    Event,
    GuestStats,
    HostStatus,
    Sample,
    VmState,
    VmStatus,
    rfc3339,
)
from qmpballoon.policy.decided import Decided, Figures

SCHEMA: Final = 1
_LARGEST_AGE_S: Final = 1e12
_NO_GUEST: Final = (*((name, None) for name in STATISTICS), ("age_s", None))


@dataclass(frozen=True, slots=True)
class Agent:
    """The publisher: ``host`` as in topics, ``name`` as it is, the program's version, the id of this run."""

    host: str
    name: str
    version: str
    instance: str
    heartbeat_s: float


def guest_object(sample: Sample | None, now_s: float) -> dict[str, object]:
    """Return the guest's figures with their age on the monotonic clock; all null without a sample."""
    if sample is None:
        return dict(_NO_GUEST)
    guest: dict[str, object] = {name: getattr(sample.stats, name) for name in STATISTICS}
    guest["age_s"] = round(max(0.0, now_s - sample.seen_at_s), 2)
    return guest


def vm_object(record: VmStatus, host: str, now_s: float, ts: datetime) -> dict[str, object]:
    """Return the VM object; the values of an offline VM that only its QEMU knows are null."""
    offline = record.health == "offline"
    return {
        "schema": SCHEMA,
        "ts": rfc3339(ts),
        "host": host,
        "vm": record.id,
        "name": record.name,
        "uuid": record.uuid,
        "life": None if record.life is None else str(record.life),
        "run_state": None if offline else record.run_state,
        "size": record.size,
        "actual": None if offline else record.actual,
        "balloon": None if offline else record.balloon,
        "target": record.target,
        "floor": record.limits.floor,
        "ceiling": record.limits.ceiling,
        "shares": record.limits.shares,
        "overridden": list(record.limits.overridden),
        "mode": record.mode,
        "policy": record.policy,
        "why": record.why,
        "why_since": None if record.why_since is None else rfc3339(record.why_since),
        "held": None if offline or record.sample is None else record.sample.held,
        "health": record.health,
        "guest": guest_object(None if offline else record.sample, now_s),
        "rss": None if offline else record.rss,
        "pid": None if offline else record.pid,
        "socket": basename(record.socket),
        "qemu": record.qemu,
    }


def state_of(vm: Mapping[str, object]) -> VmState | None:
    """Return the state in a VM object, which is untrusted; None if its QEMU has not told it."""
    size, actual, target, held, guest = (vm.get(key) for key in ("size", "actual", "target", "held", "guest"))
    if type(size) is not int or type(actual) is not int or not isinstance(guest, Mapping):
        return None
    age_s = guest.get("age_s")
    stats = None
    if isinstance(age_s, int | float) and abs(age_s) < _LARGEST_AGE_S:
        counts = {name: guest.get(name) for name in STATISTICS}
        stats = GuestStats(**{name: value for name, value in counts.items() if type(value) is int})
        stats = replace(stats, age_s=float(age_s))
    return VmState(
        run_state=str(vm.get("run_state")),
        size=size,
        actual=actual,
        target=target if type(target) is int else None,
        guest=stats,
        held=held if type(held) is int else None,
    )


def why_object(
    record: VmStatus, figures: Figures, decided: Iterable[Decided], ts: datetime
) -> dict[str, object]:
    """Return why the VM is as it is: the reason in force, its figures now, and decisions, the newest last."""
    return {
        "schema": SCHEMA,
        "ts": rfc3339(ts),
        "vm": record.id,
        "name": record.name,
        "mode": record.mode,
        "policy": record.policy,
        "health": record.health,
        "why": record.why,
        "why_since": None if record.why_since is None else rfc3339(record.why_since),
        "target": record.target,
        "figures": asdict(figures),
        "decisions": [
            {
                "ts": rfc3339(datetime.fromtimestamp(each.at, UTC)),
                "why": each.why,
                "outcome": each.outcome,
                "policy": each.policy,
                "to": each.target,
                "figures": asdict(each.figures),
            }
            for each in decided
        ],
    }


def vms_list(records: Iterable[VmStatus]) -> list[dict[str, object]]:
    """Return the list of VMs, sorted by name in topics."""
    return [
        {
            "vm": record.id,
            "name": record.name,
            "socket": basename(record.socket),
            "health": record.health,
        }
        for record in sorted(records, key=lambda record: record.id)
    ]


MOST_UNIDENTIFIED: Final = 20  # sockets that the host object lists; the others are counted


def host_object(
    record: HostStatus, agent: Agent, seq: int, uptime_s: float, ts: datetime
) -> dict[str, object]:
    """Return the host object; ``seq`` counts the host objects of this run of the agent."""
    return {
        "schema": SCHEMA,
        "ts": rfc3339(ts),
        "host": agent.host,
        "name": agent.name,
        "version": agent.version,
        "instance": agent.instance,
        "seq": seq,
        "uptime_s": round(uptime_s, 1),
        "heartbeat_s": agent.heartbeat_s,
        **host_figures(record),
    }


def host_figures(record: HostStatus) -> dict[str, object]:
    """Return what the host object says of the host: all but who publishes it."""
    return {
        "policy": record.policy,
        "mode": record.mode,
        "level": record.level,
        "budget": record.budget,
        "reserve": record.reserve,
        "used": record.used,
        "available": record.available,
        "mem_total": record.mem_total,
        "mem_available": record.mem_available,
        "psi_some_avg10": record.psi_some_avg10,
        "psi_full_avg10": record.psi_full_avg10,
        "vms": {"total": record.vms_total, "online": record.vms_online},
        "unidentified": [
            {"socket": path, "reason": reason} for path, reason in record.unidentified[:MOST_UNIDENTIFIED]
        ],
        "unidentified_more": max(0, len(record.unidentified) - MOST_UNIDENTIFIED),
        "reclaimable": record.reclaimable,
        "room": record.room,
        "holds": [dict(hold) for hold in record.holds],
        "alarms": list(record.alarms),
        "sampling_late_s": record.sampling_late_s,
    }


def event_object(vm: str | None, event: Event) -> dict[str, object]:
    """Return an event of a VM, or of the host where ``vm`` is None."""
    return {
        "schema": SCHEMA,
        "ts": rfc3339(event.ts),
        "vm": vm,
        "event": event.event,
        "data": dict(event.data),
    }


def samples_object(
    records: Iterable[VmStatus], host: HostStatus | None, now_s: float, ts: datetime
) -> dict[str, object]:
    """Return one tick's figures of all VMs, for recorders."""
    return {
        "schema": SCHEMA,
        "ts": rfc3339(ts),
        "host": {
            "mem_available": None if host is None else host.mem_available,
            "psi_some_avg10": None if host is None else host.psi_some_avg10,
            "psi_full_avg10": None if host is None else host.psi_full_avg10,
        },
        "vms": {
            record.id: {
                "actual": record.actual,
                "target": record.target,
                "rss": record.rss,
                "guest": guest_object(record.sample, now_s),
            }
            for record in records
            if record.health != "offline"
        },
    }


def response_object(
    transaction: object,
    vm: str | None,
    verb: str,
    ts: datetime,
    *,
    result: object = None,
    error: QmpBalloonError | None = None,
) -> Mapping[str, object]:
    """Return the answer to a request: its result, or the error's stable word and message."""
    return {
        "transaction": transaction,
        "vm": vm,
        "verb": verb,
        "status": "ok" if error is None else "error",
        "result": result if error is None else None,
        "error": None if error is None else {"code": error.code, "message": str(error)},
        "ts": rfc3339(ts),
    }
