"""What is not published again is as good as published: every key of an object is in its dead band."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.model.names import VmId
from qmpballoon.model.records import (
    HEALTH_WORDS,
    LEVELS,
    MODES,
    POLICIES,
    STATISTICS,
    GuestStats,
    HostStatus,
    Life,
    Limits,
    Sample,
    VmStatus,
)
from qmpballoon.mqtt.dead_band import host_changed, leaves_coarse_band, leaves_dead_band, vm_changed
from qmpballoon.protocol.fields import HOST_FIELDS, VM_FIELDS, Field
from qmpballoon.protocol.objects import host_figures, vm_object
from qmpballoon.units import MIB

NOW = datetime(2026, 11, 23, tzinfo=UTC)

_sizes = st.sampled_from([None, 100 * MIB, 100 * MIB + 4096, 104 * MIB])
_known = st.sampled_from([100 * MIB, 100 * MIB + 4096, 104 * MIB])
_counts = st.sampled_from([None, 0, 7])
_levels = st.sampled_from([None, 0.0, 0.5, 9.0])
_stamps = st.sampled_from([None, NOW, NOW + timedelta(seconds=1)])

_samples = st.builds(
    Sample,
    st.builds(
        GuestStats,
        **{
            name: _sizes if name in ("total", "free", "available", "caches") else _counts
            for name in STATISTICS
        },
    ),
    seen_at_s=st.sampled_from([1.0, 2.0]),
    actual=_sizes,
)
_vms: dict[str, st.SearchStrategy[Any]] = {
    "id": st.just(VmId("web1")),
    "name": st.sampled_from(["web1", "web1 of shop"]),
    "socket": st.sampled_from(["/run/a.qmp", "/run/b.qmp"]),
    "health": st.sampled_from(HEALTH_WORDS),
    "life": st.sampled_from([None, Life(1, 2), Life(1, 3)]),
    "uuid": st.sampled_from([None, "a", "b"]),
    "qemu": st.sampled_from([None, "7.2.22", "10.0.13"]),
    "run_state": st.sampled_from([None, "running", "paused"]),
    "size": _sizes,
    "actual": _sizes,
    "target": _sizes,
    "limits": st.builds(
        Limits, _sizes, _sizes, st.sampled_from([500, 1000]), st.sampled_from([(), ("floor",)])
    ),
    "mode": st.sampled_from(MODES),
    "policy": st.sampled_from(POLICIES),
    "why": st.sampled_from([None, "grow", "shrink"]),
    "why_since": _stamps,
    "sample": st.none() | _samples,
    "rss": _sizes,
    "pid": st.sampled_from([None, 1, 2]),
}
_hosts: dict[str, st.SearchStrategy[Any]] = {
    "level": st.sampled_from(LEVELS),
    "policy": st.sampled_from(POLICIES),
    "mode": st.sampled_from(MODES),
    "budget": _sizes,
    "reserve": _sizes,
    "used": _known,
    "available": _sizes,
    "mem_total": _sizes,
    "mem_available": _sizes,
    "psi_some_avg10": _levels,
    "psi_full_avg10": _levels,
    "vms_total": st.sampled_from([1, 2]),
    "vms_online": st.sampled_from([0, 1]),
    "unidentified": st.sampled_from([(), (("/run/x", "no answer yet"),)]),
    "reclaimable": _known,
    "room": _known,
    "holds": st.sampled_from([(), ({"hold": "hold-1", "size": 5, "left_s": 3.0},)]),
    "alarms": st.sampled_from([(), ("too much is held",)]),
    "sampling_late_s": st.sampled_from([0.0, 0.3, 5.0]),
}


def pairs(kind: type, values: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
    """Return two records that differ in one or two fields."""

    def change(before: Any) -> st.SearchStrategy[tuple[Any, Any]]:
        def changed(names: Iterable[str]) -> st.SearchStrategy[Any]:
            same = {name: st.just(getattr(before, name)) for name in values}
            return st.builds(kind, **(same | {name: values[name] for name in names}))

        some = st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=2, unique=True)
        return st.tuples(st.just(before), some.flatmap(changed))

    return st.builds(kind, **values).flatmap(change)


def value_at(document: Mapping[str, Any], field: Field) -> Any:
    value: Any = document
    for key in field.path.split("."):
        value = value[key]
    return value


def differs(field: Field, before: Any, now: Any, whole: int) -> bool:
    match field.kind:
        case "bytes":
            return leaves_dead_band(before, now, whole)
        case "counter":
            return (before is None) != (now is None)
        case "percent":
            return leaves_coarse_band(before, now)
        case "seconds" if field.path == "guest.age_s":
            return (before is None) != (now is None)
        case "seconds":
            return leaves_coarse_band(before, now) or (before > 0) != (now > 0)
        case _:
            return bool(before != now)


@given(pairs(VmStatus, _vms))
def test_no_key_of_a_vm_is_old_for_want_of_a_message(records: tuple[VmStatus, VmStatus]) -> None:
    before, now = (vm_object(record, "edge-7", 3.0, NOW) for record in records)
    different = [
        field.path
        for field in VM_FIELDS
        if differs(field, value_at(before, field), value_at(now, field), whole=0)
    ]
    assert vm_changed(*records) or not different


@given(pairs(HostStatus, _hosts))
def test_no_key_of_a_host_is_old_for_want_of_a_message(records: tuple[HostStatus, HostStatus]) -> None:
    before, now = map(host_figures, records)
    whole = max(records[0].budget or 0, records[0].mem_total or 0)
    different = [
        field.path
        for field in HOST_FIELDS
        if field.path.partition(".")[0] in before
        and differs(field, value_at(before, field), value_at(now, field), whole)
    ]
    assert host_changed(*records) or not different
