"""The schemas: they are what the files hold, are valid themselves, and agree with what is read and made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from schema_checks import check, check_event, strict
from write_schemas import files

from qmpballoon.agent.vm import _PUBLISHED
from qmpballoon.errors import NotReady, RequestRefused
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, GuestStats, HostStatus, Life, Limits, Sample, VmStatus
from qmpballoon.mqtt.asyncapi import asyncapi_document
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.event_kinds import HOST_EVENTS, VM_EVENTS
from qmpballoon.protocol.objects import (
    Agent,
    event_object,
    host_object,
    response_object,
    samples_object,
    vm_object,
    vms_list,
)
from qmpballoon.protocol.payloads import Content
from qmpballoon.protocol.schemas import RESULTS, schemas
from qmpballoon.protocol.verbs import VERBS, Scope, read_asked
from qmpballoon.qmp.events import translated

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 23, tzinfo=UTC)
EVERY_VERB = [(scope, verb) for scope, verbs in VERBS.items() for verb in verbs]

UNKNOWN = VmStatus(VmId("web1"), "web1", "/run/web1.qmp", "offline")
KNOWN = VmStatus(
    VmId("web1"),
    "web1",
    "/run/web1.qmp",
    "ok",
    life=Life(1, 2),
    uuid="u",
    qemu="7.2.22",
    run_state="running",
    size=10,
    actual=5,
    target=5,
    limits=Limits(1, 10, 1000, ("floor",)),
    why="give",
    why_since=NOW,
    sample=Sample(GuestStats(total=9, free=1, available=2, oom_kills=3), 0.0, 5),
    rss=7,
    pid=1,
)
HOST = HostStatus(
    level="ok",
    policy="fairshare",
    mode="auto",
    budget=None,
    reserve=None,
    used=1,
    available=None,
    mem_total=None,
    mem_available=None,
    psi_some_avg10=None,
    psi_full_avg10=0.5,
    vms_total=1,
    vms_online=1,
    unidentified=(("/run/a.qmp", "no greeting"),),
    reclaimable=0,
    room=0,
    holds=({"hold": "hold-1", "size": 1, "left_s": 2.5},),
    alarms=("the floors exceed the budget",),
)


def test_the_files_are_what_the_tables_say() -> None:
    wrong = [path for path, text in files().items() if (ROOT / path).read_text(encoding="utf-8") != text]
    assert wrong == [], "run scripts/write_schemas.py"
    assert {path.name for path in (ROOT / "qmpballoon/schemas").iterdir()} == {
        Path(path).name for path in files() if path.startswith("qmpballoon/schemas/")
    }


def test_every_schema_is_valid() -> None:
    for schema in schemas().values():
        Draft7Validator.check_schema(schema)


def test_the_asyncapi_document_is_valid() -> None:
    specification = json.loads((ROOT / "tests/asyncapi/asyncapi-3.0.0.json").read_text(encoding="utf-8"))
    valid = Draft7Validator(specification)
    document = asyncapi_document("0.1.0")
    assert [f"{error.json_path}: {error.message}" for error in valid.iter_errors(document)] == []
    document["operations"]["publish.status"]["action"] = "shout"
    assert not valid.is_valid(document)


def references(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key == "$ref":
                yield str(each)
            else:
                yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    document = asyncapi_document("0.1.0")
    found = set(references(document))
    assert found
    for reference in found:
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_the_topics_are_those_of_the_agent() -> None:
    topics = Topics("qmpballoon", "edge-7")
    document = asyncapi_document("0.1.0")
    addresses = {
        name: channel["address"].format(base="qmpballoon", host="edge-7", vm="web1")
        for name, channel in document["channels"].items()
    }
    expected = {
        "status": topics.status,
        "host": topics.host_object,
        "vms": topics.vms,
        "samples": topics.samples,
        "vmAvailability": topics.availability("web1"),
        "vmState": topics.state("web1"),
        "vmEvent": topics.event("web1"),
        "hostEvent": topics.event(None),
        "vm.target-set": "qmpballoon/edge-7/vm/web1/target/set",
    }
    for scope, verb in EVERY_VERB:
        vm = None if scope == "host" else "web1"
        expected[f"{scope}.{verb}.request"] = topics.request(vm, verb)
        expected[f"{scope}.{verb}.response"] = topics.response(vm, verb)
    assert addresses == expected


def test_every_verb_has_a_described_result() -> None:
    assert set(RESULTS) == set(EVERY_VERB)


def test_every_event_of_qemu_that_is_published_is_described() -> None:
    words = {translated(name, {}).event for name in _PUBLISHED}
    assert words <= {kind.word for kind in VM_EVENTS}


@pytest.mark.parametrize("status", [KNOWN, UNKNOWN])
def test_the_objects_are_valid_and_have_no_other_keys(status: VmStatus) -> None:
    agent = Agent("edge-7", "Edge 7", "0.1.0", "abcd", 60.0)
    check("vm", vm_object(status, "edge-7", 1.0, NOW))
    check("vms", vms_list([status]))
    check("host", host_object(HOST, agent, 1, 2.0, NOW))
    check("samples", samples_object([status], HOST, 1.0, NOW))
    check("samples", samples_object([status], None, 1.0, NOW))


def test_an_object_with_another_type_or_key_is_not_valid() -> None:
    vm = vm_object(KNOWN, "edge-7", 1.0, NOW)
    for wrong in ({"actual": "5"}, {"health": "fine"}, {"more": 1}, {"ts": "yesterday"}, {"guest": None}):
        with pytest.raises(AssertionError):
            check("vm", {**vm, **wrong})
    for missing in vm:
        with pytest.raises(AssertionError):
            check("vm", {key: value for key, value in vm.items() if key != missing})


def test_a_reader_may_find_more_keys_than_the_schema_names() -> None:
    vm = vm_object(KNOWN, "edge-7", 1.0, NOW)
    assert Draft7Validator(schemas()["vm"]).is_valid({**vm, "more": 1})
    event = {"schema": 1, "ts": vm["ts"], "vm": "web1", "event": "new-word", "data": {"x": 1}}
    assert Draft7Validator(schemas()["vm-event"]).is_valid(event)


@pytest.mark.parametrize("kind", [*VM_EVENTS, *HOST_EVENTS], ids=lambda kind: kind.word)
def test_an_event_without_its_data_or_with_others_is_not_valid(kind: Any) -> None:
    vm = "web1" if kind in VM_EVENTS else None
    name = "vm-event" if vm else "host-event"
    value = event_object(vm, Event(kind.word, NOW, {}))
    needs = {row.path for row in kind.data} - kind.optional
    assert Draft7Validator(schemas()[name]).is_valid(value) == (not needs)
    if not kind.is_open:
        with pytest.raises(AssertionError):
            check(name, event_object(vm, Event(kind.word, NOW, {"unheard-of": 1})))


def test_events_are_checked() -> None:
    check_event(event_object("web1", Event("health", NOW, {"from": "ok", "to": "stale"})))
    with pytest.raises(AssertionError):
        check_event(event_object("web1", Event("health", NOW, {"from": "ok", "to": "fine"})))
    with pytest.raises(AssertionError):
        check_event(event_object("web1", Event("unheard-of", NOW, {})))


def test_answers_are_valid() -> None:
    result = {"target": 5, "actual": None, "reached": False}
    check("vm.set-target.response", response_object([1], "web1", "set-target", NOW, result=result))
    check("vm.set-target.response", response_object(None, "web1", "set-target", NOW, error=NotReady("x")))
    with pytest.raises(AssertionError):
        check("vm.set-target.response", response_object(1, "web1", "set-target", NOW, result={"target": 5}))


REQUESTS: list[tuple[Scope, str, object]] = [
    ("vm", "get", {}),
    ("vm", "get", {"x": 1}),
    ("vm", "set-target", {"target": 5}),
    ("vm", "set-target", {"target": "50%", "wait_s": 600}),
    ("vm", "set-target", {"target": "5 MiB", "wait_s": None}),
    ("vm", "set-target", {"target": 256.0}),
    ("vm", "set-target", {"target": None}),
    ("vm", "set-target", {"target": True}),
    ("vm", "set-target", {"target": 0}),
    ("vm", "set-target", {"target": 2**53 + 2}),
    ("vm", "set-target", {"target": "5M"}),
    ("vm", "set-target", {"target": 5, "wait_s": 601}),
    ("vm", "set-target", {"target": 5, "wait_s": "3"}),
    ("vm", "set-target", {}),
    ("vm", "set-target", "256MiB"),
    ("vm", "set-target", "much"),
    ("vm", "set-target", 256),
    ("vm", "set-mode", {"mode": "auto"}),
    ("vm", "set-mode", {"mode": "autoo"}),
    ("vm", "set-mode", {"mode": "auto", "for_s": 0.5}),
    ("vm", "set-limits", {}),
    ("vm", "set-limits", {"floor": None}),
    ("vm", "set-limits", {"shares": 1.5}),
    ("vm", "set-limits", {"shares": 5, "ceiling": "1GiB"}),
    ("host", "release", {"hold": "hold-1"}),
    ("host", "release", {"hold": ""}),
    ("host", "set-policy", {"name": "fixed"}),
    ("host", "set-policy", {"name": None, "mode": "auto"}),
    ("host", "set-policy", "fixed"),
    ("host", "room", {"size": "2GiB"}),
    ("host", "room", {}),
    ("host", "reclaim", {"size": "1GiB", "deadline_s": 0, "hold_s": 5}),
    ("host", "list", {}),
    ("host", "list", 5),
]


@pytest.mark.parametrize(("scope", "verb", "request_"), REQUESTS)
def test_a_schema_allows_what_the_agent_takes(scope: Scope, verb: str, request_: Any) -> None:
    content = Content(arguments=request_) if isinstance(request_, dict) else Content(bare=request_)
    try:
        read_asked(verb, scope, content)
        is_taken = True
    except RequestRefused:
        is_taken = False
    assert Draft7Validator(schemas()[f"{scope}.{verb}.request"]).is_valid(request_) == is_taken


def test_a_request_may_have_a_transaction() -> None:
    assert Draft7Validator(schemas()["vm.get.request"]).is_valid({"transaction": {"any": [1]}})


def test_the_strict_form_keeps_maps_open() -> None:
    assert strict({"type": "object", "additionalProperties": {"type": "integer"}}) == {
        "type": "object",
        "additionalProperties": {"type": "integer"},
    }
