"""The published objects have exactly the contract's keys, even if values are unknown."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime

from qmpballoon.errors import RequestRefused
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, GuestStats, HostStatus, Life, Limits, Sample, VmStatus
from qmpballoon.protocol.objects import (
    MOST_UNIDENTIFIED,
    Agent,
    event_object,
    host_object,
    response_object,
    samples_object,
    vm_object,
    vms_list,
)

TS = datetime(2026, 11, 23, 8, 31, 5, 123456, UTC)
UNKNOWN = VmStatus(VmId("web1"), "web 1", "/run/qmpballoon/web1.qmp", "starting")
KNOWN = dataclasses.replace(
    UNKNOWN,
    health="ok",
    life=Life(4711, 889123),
    run_state="running",
    size=268435456,
    actual=134217728,
    target=134217728,
    limits=Limits(67108864, 268435456, 1000, ("floor",)),
    why="at-ease",
    why_since=TS,
    sample=Sample(GuestStats(total=227966976, free=66379776), seen_at_s=100.0),
    rss=193316000,
    pid=4711,
    qemu="7.2.22",
)
GUEST_KEYS = [
    "total",
    "free",
    "available",
    "caches",
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "hugetlb_allocs",
    "hugetlb_failures",
    "oom_kills",
    "alloc_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
    "age_s",
]
VM_KEYS = [
    "schema",
    "ts",
    "host",
    "vm",
    "name",
    "uuid",
    "life",
    "run_state",
    "size",
    "actual",
    "balloon",
    "target",
    "floor",
    "ceiling",
    "shares",
    "overridden",
    "mode",
    "policy",
    "why",
    "why_since",
    "held",
    "health",
    "guest",
    "rss",
    "pid",
    "socket",
    "qemu",
]


def test_every_key_of_a_vm_is_there_and_null_when_unknown() -> None:
    shown = vm_object(UNKNOWN, "edge-7", 0.0, TS)
    assert list(shown) == VM_KEYS
    assert shown["guest"] == dict.fromkeys(GUEST_KEYS)
    assert shown["ts"] == "2026-11-23T08:31:05.123Z"
    assert {key for key, value in shown.items() if value is None} == {
        "uuid", "life", "run_state", "size", "actual", "balloon", "target", "floor", "ceiling", "why",
        "why_since", "held", "rss", "pid", "qemu",
    }  # fmt: skip


def test_a_known_vm_is_shown_with_the_age_of_its_sample_now() -> None:
    shown = vm_object(KNOWN, "edge-7", 100.4, TS)
    assert list(shown) == VM_KEYS
    assert shown["life"] == "4711-889123"
    assert shown["balloon"] == 134217728
    assert (shown["why"], shown["why_since"]) == ("at-ease", "2026-11-23T08:31:05.123Z")
    assert shown["socket"] == "web1.qmp"
    assert shown["overridden"] == ["floor"]
    guest = shown["guest"]
    assert isinstance(guest, dict)
    assert list(guest) == GUEST_KEYS
    assert (guest["free"], guest["available"], guest["age_s"]) == (66379776, None, 0.4)


def test_an_offline_vm_has_its_limits_but_nothing_that_only_its_qemu_knows() -> None:
    shown = vm_object(dataclasses.replace(KNOWN, health="offline"), "edge-7", 101.0, TS)
    assert [shown[key] for key in ("run_state", "actual", "balloon", "rss", "pid")] == [None] * 5
    assert shown["guest"] == dict.fromkeys(GUEST_KEYS)
    assert (shown["floor"], shown["mode"]) == (67108864, "auto")


def test_the_list_of_vms_is_sorted() -> None:
    other = dataclasses.replace(UNKNOWN, id=VmId("db1"), socket="/run/db1.qmp")
    assert vms_list([KNOWN, other]) == [
        {"vm": "db1", "name": "web 1", "socket": "db1.qmp", "health": "starting"},
        {"vm": "web1", "name": "web 1", "socket": "web1.qmp", "health": "ok"},
    ]


def test_the_host_object_has_the_keys_of_the_contract() -> None:
    record = HostStatus(
        "ok",
        "fairshare",
        "auto",
        10,
        2,
        3,
        7,
        100,
        50,
        0.5,
        None,
        2,
        1,
        (("/run/x.qmp", "no answer yet"),),
        4,
        5,
        ({"hold": "a"},),
    )
    agent = Agent("edge-7", "edge-7.lan", "0.1.0", "f00", 60)
    shown = host_object(record, agent, 9, 12.345, TS)
    assert list(shown) == [
        "schema",
        "ts",
        "host",
        "name",
        "version",
        "instance",
        "seq",
        "uptime_s",
        "heartbeat_s",
        "policy",
        "mode",
        "level",
        "budget",
        "reserve",
        "used",
        "available",
        "mem_total",
        "mem_available",
        "psi_some_avg10",
        "psi_full_avg10",
        "vms",
        "unidentified",
        "unidentified_more",
        "reclaimable",
        "room",
        "holds",
        "alarms",  # not in the contract
        "sampling_late_s",  # not in the contract
    ]
    assert shown["vms"] == {"total": 2, "online": 1}
    assert shown["psi_full_avg10"] is None
    assert shown["holds"] == [{"hold": "a"}]


def test_events_and_samples_have_their_shape() -> None:
    assert event_object("web1", Event("health", TS, {"from": "ok", "to": "stale"})) == {
        "schema": 1,
        "ts": "2026-11-23T08:31:05.123Z",
        "vm": "web1",
        "event": "health",
        "data": {"from": "ok", "to": "stale"},
    }
    shown = samples_object([KNOWN, dataclasses.replace(UNKNOWN, health="offline")], None, 101.0, TS)
    assert shown["host"] == {"mem_available": None, "psi_some_avg10": None, "psi_full_avg10": None}
    assert isinstance(shown["vms"], dict)
    assert list(shown["vms"]["web1"]) == ["actual", "target", "rss", "guest"]


def test_an_answer_has_a_result_or_an_error_and_always_both_keys() -> None:
    good = response_object(7, "web1", "get", TS, result={"a": 1})
    assert list(good) == ["transaction", "vm", "verb", "status", "result", "error", "ts"]
    assert (good["status"], good["error"]) == ("ok", None)
    bad = response_object(None, None, "list", TS, error=RequestRefused("busy", "wait"))
    assert (bad["status"], bad["result"]) == ("error", None)
    assert bad["error"] == {"code": "busy", "message": "wait"}


def test_unidentified_sockets_are_listed_up_to_a_number_and_the_others_counted() -> None:
    many = tuple((f"/run/{number}.qmp", "no answer yet") for number in range(2000))
    record = HostStatus("ok", "fairshare", "auto", 10, 2, 3, 7, 100, 50, 0.5, 0.1, 2, 1, many, 4, 5)
    agent = Agent(host="edge-7", name="edge-7", version="1", instance="a", heartbeat_s=60)
    shown = host_object(record, agent, 1, 1.0, TS)
    assert shown["unidentified_more"] == 2000 - MOST_UNIDENTIFIED
    assert len(json.dumps(shown)) < 3000
