"""The text that Prometheus reads: names, units, values, and what is not known."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qmpballoon.metrics import families as families_module
from qmpballoon.metrics.families import HOST_ROWS, VM_ROWS, VMS_AT_ONCE, Reading, exposition
from qmpballoon.metrics.tally import LAG_BUCKETS_S, Tally
from qmpballoon.model.names import VmId
from qmpballoon.model.records import (
    HEALTH_WORDS,
    LEVELS,
    Event,
    GuestStats,
    HostStatus,
    Limits,
    Sample,
    VmStatus,
    utc_now,
)
from qmpballoon.units import MIB

NOW_S = 1000.0
WEB1 = VmStatus(
    VmId("web1"),
    "web1",
    "/run/web1.qmp",
    "ok",
    size=256 * MIB,
    actual=128 * MIB,
    target=120 * MIB,
    limits=Limits(64 * MIB, 256 * MIB, 500),
    sample=Sample(
        GuestStats(total=100 * MIB, free=20 * MIB, available=30 * MIB, caches=15 * MIB, swap_in=4096),
        seen_at_s=NOW_S - 1.5,
        actual=128 * MIB,
    ),
    rss=190 * MIB,
)
OFFLINE = VmStatus(VmId("db1"), "db1", "/run/db1.qmp", "offline", mode="manual")
HOST = HostStatus(
    level="soft",
    policy="fairshare",
    mode="auto",
    budget=1000,
    reserve=50,
    used=600,
    available=400,
    mem_total=2000,
    mem_available=None,
    psi_some_avg10=12.5,
    psi_full_avg10=None,
    vms_total=2,
    vms_online=1,
    unidentified=(("/run/x.qmp", "no answer"),),
    reclaimable=70,
    room=300,
    holds=({"hold": "hold-1", "size": 30, "left_s": 5.0}, {"hold": "hold-2", "size": 12, "left_s": 5.0}),
    alarms=("a",),
    sampling_late_s=0.3,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def a_tally() -> Tally:
    tally = Tally(lambda: NOW_S)
    tally.host_changed(HOST)
    tally.host_at_s = NOW_S - 2
    return tally


def a_reading(*vms: VmStatus, tally: Tally | None = None, broker: bool | None = True) -> Reading:
    return Reading(vms, tally or a_tally(), broker, NOW_S)


def parsed(text: bytes) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in samples, f"twice: {key}"
            samples[key] = sample.value
    return samples


async def samples_of(reading: Reading) -> Samples:
    return parsed(await exposition(reading))


async def test_a_vms_figures_are_those_of_its_record() -> None:
    found = await samples_of(a_reading(WEB1, OFFLINE))
    web1 = {name: value for (name, labels), value in found.items() if labels == (("vm", "web1"),)}
    assert web1 == {
        "qmpballoon_vm_up": 1,
        "qmpballoon_vm_healthy": 1,
        "qmpballoon_vm_automatic": 1,
        "qmpballoon_vm_size_bytes": 256 * MIB,
        "qmpballoon_vm_actual_bytes": 128 * MIB,
        "qmpballoon_vm_target_bytes": 120 * MIB,
        "qmpballoon_vm_floor_bytes": 64 * MIB,
        "qmpballoon_vm_ceiling_bytes": 256 * MIB,
        "qmpballoon_vm_shares": 500,
        "qmpballoon_vm_rss_bytes": 190 * MIB,
        "qmpballoon_vm_held_bytes": 98 * MIB,
        "qmpballoon_vm_guest_memory_bytes": 100 * MIB,
        "qmpballoon_vm_guest_available_bytes": 30 * MIB,
        "qmpballoon_vm_guest_free_bytes": 20 * MIB,
        "qmpballoon_vm_guest_caches_bytes": 15 * MIB,
        "qmpballoon_vm_guest_swap_in_bytes_total": 4096,
        "qmpballoon_vm_sample_age_seconds": 1.5,
        "qmpballoon_vm_emergencies_total": 0,
    }


async def test_what_is_not_known_has_no_sample() -> None:
    found = await samples_of(a_reading(OFFLINE))
    assert {name: value for (name, labels), value in found.items() if labels == (("vm", "db1"),)} == {
        "qmpballoon_vm_up": 0,
        "qmpballoon_vm_healthy": 0,
        "qmpballoon_vm_automatic": 0,
        "qmpballoon_vm_shares": 1000,
        "qmpballoon_vm_emergencies_total": 0,
    }
    assert ("qmpballoon_host_memory_available_bytes", ()) not in found
    assert ("qmpballoon_host_stall_full_ratio", ()) not in found


async def test_the_hosts_figures_are_those_of_its_record() -> None:
    found = await samples_of(a_reading(WEB1, OFFLINE))
    expected = {
        "host_budget_bytes": 1000,
        "host_reserve_bytes": 50,
        "host_used_bytes": 600,
        "host_budget_available_bytes": 400,
        "host_room_bytes": 300,
        "host_reclaimable_bytes": 70,
        "host_on_hold_bytes": 42,
        "host_memory_bytes": 2000,
        "host_stall_some_ratio": 0.125,
        "host_alarms": 1,
        "host_unidentified_sockets": 1,
        "sampling_late_seconds": 0.3,
        "tick_age_seconds": 2,
        "broker_connected": 1,
    }
    assert {name: found[f"qmpballoon_{name}", ()] for name in expected} == expected
    assert {word: found["qmpballoon_host_level", (("level", word),)] for word in LEVELS} == {
        "ok": 0,
        "soft": 1,
        "hard": 0,
        "low": 0,
    }
    by_health = {word: found["qmpballoon_vms", (("health", word),)] for word in HEALTH_WORDS}
    assert {word: number for word, number in by_health.items() if number} == {"ok": 1, "offline": 1}
    assert found["qmpballoon_policy_info", (("mode", "auto"), ("name", "fairshare"))] == 1
    assert found["process_resident_memory_bytes", ()] > MIB


@pytest.mark.parametrize(("broker", "value"), [(True, 1), (False, 0), (None, None)])
async def test_without_a_configured_broker_nothing_is_said_about_it(
    broker: bool | None, value: int | None
) -> None:
    assert (await samples_of(a_reading(broker=broker))).get(("qmpballoon_broker_connected", ())) == value


async def test_before_the_first_tick_there_are_no_figures_of_the_host() -> None:
    found = await samples_of(a_reading(WEB1, tally=Tally(lambda: NOW_S)))
    assert not [name for name, _ in found if name.startswith("qmpballoon_host_")]
    assert ("qmpballoon_vm_actual_bytes", (("vm", "web1"),)) in found


async def test_decisions_emergencies_and_answers_are_counted() -> None:
    tally = a_tally()

    def decide(vm: str, why: str, *, sent: bool = True) -> None:
        tally.vm_event(VmId(vm), Event("decision", utc_now(), {"why": why, "sent": sent}))

    decide("web1", "give")
    decide("web1", "give")
    decide("web1", "emergency")
    decide("web1", "emergency", sent=False)
    tally.vm_event(VmId("web1"), Event("health", utc_now(), {"from": "ok", "to": "stale"}))
    for verb, outcome in [("set-target", "ok"), ("set-target", "out-of-range"), ("x" * 9, "unknown-verb")]:
        tally.note_answer(verb, outcome)
    found = await samples_of(a_reading(WEB1, tally=tally))
    decisions = {
        tuple(dict(labels).values()): value
        for (name, labels), value in found.items()
        if name == "qmpballoon_decisions_total"
    }
    assert decisions == {("sent", "give"): 2, ("sent", "emergency"): 1, ("observed", "emergency"): 1}
    assert found["qmpballoon_vm_emergencies_total", (("vm", "web1"),)] == 1
    answers = {
        tuple(dict(labels).values()): value
        for (name, labels), value in found.items()
        if name == "qmpballoon_requests_total"
    }
    assert answers == {
        ("ok", "set-target"): 1,
        ("out-of-range", "set-target"): 1,
        ("unknown-verb", "unknown"): 1,
    }
    tally.vm_gone(VmId("web1"))
    assert not tally.emergencies


async def test_the_lag_of_the_loop_is_a_histogram() -> None:
    tally = a_tally()
    for late_s in (-0.1, 0.001, 0.3, 99.0):
        tally.lag.note(late_s)
    found = await samples_of(a_reading(tally=tally))
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "qmpballoon_loop_lag_seconds_bucket"
    }
    assert [float(bound) for bound in buckets] == [*LAG_BUCKETS_S, float("inf")]
    assert (buckets["0.001"], buckets["0.25"], buckets["0.5"], buckets["+Inf"]) == (2, 2, 3, 4)
    assert found["qmpballoon_loop_lag_seconds_count", ()] == 4
    assert found["qmpballoon_loop_lag_seconds_sum", ()] == pytest.approx(99.301)


async def test_many_vms_are_one_metric_each_with_one_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families_module, "VMS_AT_ONCE", 2)
    vms = [replace(OFFLINE, id=VmId("none"))] * 2  # the first ones have no figures
    vms = [replace(vm, id=VmId(f"none{number}")) for number, vm in enumerate(vms)]
    vms += [replace(WEB1, id=VmId(f"vm{number}")) for number in range(5)]
    text = await exposition(a_reading(*vms))
    heads = re.findall(rb"^# TYPE (\S+)", text, flags=re.MULTILINE)
    assert len(heads) == len(set(heads))
    assert (
        set(re.findall(rb"^([a-z_]+)(?=[{ ])", text, flags=re.MULTILINE))
        - {head + suffix for head in heads for suffix in (b"", b"_bucket", b"_sum", b"_count")}
        == set()
    )
    found = parsed(text)
    sized = [labels for name, labels in found if name == "qmpballoon_vm_size_bytes"]
    assert sized == [(("vm", f"vm{number}"),) for number in range(5)]


async def test_other_tasks_run_while_a_text_of_many_vms_is_made() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other(), name="other")
    many = [replace(WEB1, id=VmId(f"vm{number}")) for number in range(4 * VMS_AT_ONCE)]
    await exposition(a_reading(*many))
    task.cancel()
    assert turns >= 4 * len(VM_ROWS)


async def test_names_and_units_follow_the_conventions() -> None:
    known = ("total", "free", "available", "caches", "swap_in", "swap_out", "major_faults", "oom_kills")
    guest = GuestStats(**dict.fromkeys(known, 1))
    full = replace(WEB1, sample=Sample(guest, NOW_S, actual=1))
    text = (await exposition(a_reading(full))).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE))
    about = dict(re.findall(r"^# HELP (\S+) (.+)$", text, flags=re.MULTILINE))
    ours = {name for name in kinds if not name.startswith("process_")}
    assert ours >= {f"qmpballoon_{row.name}" for row in VM_ROWS}
    assert len(ours) >= len(HOST_ROWS) + 15
    assert set(about) == set(kinds)
    for name in ours:
        assert re.fullmatch(r"qmpballoon(_[a-z]+)+", name)
        assert about[name].endswith(".")
        assert (kinds[name] == "counter") == name.endswith("_total"), name
        assert not re.search(r"(mib|kib|_ms|milliseconds|percent)(_total)?$", name), name
    unit_of = {name.removesuffix("_total").rpartition("_")[2] for name in ours}
    no_unit = {"up", "healthy", "automatic", "shares", "alarms", "sockets", "connected", "level", "vms"}
    counts = {"faults", "kills", "emergencies", "decisions", "requests"}
    assert unit_of <= {"bytes", "seconds", "ratio", "info"} | no_unit | counts
