"""The table of what is published agrees with the published objects and with the verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import pytest
from test_protocol_objects import KNOWN, TS, UNKNOWN

from qmpballoon.model.records import HEALTH_WORDS, LEVELS, GuestStats, HostStatus, Sample
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.fields import HOST_FIELDS, NO_PROBLEM, PROBLEM_LEVELS, VM_FIELDS, Field
from qmpballoon.protocol.objects import Agent, host_object, vm_object
from qmpballoon.protocol.payloads import Content
from qmpballoon.protocol.verbs import Scope, read_asked

AGENT = Agent("edge-7", "edge-7", "0.1.0", "f00", 60.0)
HOST = HostStatus("ok", "fairshare", "auto", 10, 2, 3, 7, 100, 50, 0.5, 0.1, 2, 1, (), 4, 5)
NO_HOST = HostStatus("ok", "fairshare", "auto", None, None, 3, None, None, None, None, None, 2, 1, (), 4, 5)
FULL = dataclasses.replace(KNOWN, uuid="u", sample=Sample(GuestStats(*range(1, 17)), 100.0, actual=10))
VMS = [vm_object(record, "edge-7", 101.0, TS) for record in (UNKNOWN, KNOWN, FULL)]
HOSTS = [host_object(record, AGENT, 1, 2.0, TS) for record in (HOST, NO_HOST)]
OBJECTS = [*((VM_FIELDS, each) for each in VMS), *((HOST_FIELDS, each) for each in HOSTS)]
WRITABLE = [
    (scope, field)
    for scope, fields in (("vm", VM_FIELDS), ("host", HOST_FIELDS))
    for field in fields
    if field.write is not None
]


def flat(value: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, each in value.items():
        if isinstance(each, dict):
            yield from flat(each, f"{start}{key}.")
        else:
            yield f"{start}{key}", each


def fits(field: Field, value: object) -> bool:
    match field.kind:
        case "bytes" | "whole" | "counter":
            return type(value) is int
        case "percent" | "seconds":
            return type(value) in (int, float)
        case "word":
            return value in field.words
        case "text":
            return type(value) is str
        case "stamp":
            return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
        case "list":
            return type(value) is list
    return False


@pytest.mark.parametrize(("fields", "published"), OBJECTS)
def test_there_is_a_row_for_each_key_in_its_order(fields: tuple[Field, ...], published: Any) -> None:
    assert [field.path for field in fields] == [path for path, _ in flat(published)]


@pytest.mark.parametrize(("fields", "published"), OBJECTS)
def test_each_value_is_of_its_kind_or_null_where_that_is_said(
    fields: tuple[Field, ...], published: Any
) -> None:
    values = dict(flat(published))
    for field in fields:
        value = values[field.path]
        assert field.nullable if value is None else fits(field, value), (field, value)


def test_what_is_said_to_be_null_at_times_is_null_of_an_unknown_vm_or_host() -> None:
    for fields, published in ((VM_FIELDS, VMS[0]), (HOST_FIELDS, HOSTS[1])):
        values = dict(flat(published))
        assert {field.path for field in fields if field.nullable} == {
            path for path, value in values.items() if value is None
        }


@pytest.mark.parametrize("fields", [VM_FIELDS, HOST_FIELDS])
def test_words_and_bounds_belong_to_their_kinds(fields: tuple[Field, ...]) -> None:
    paths = {field.path for field in fields}
    for field in fields:
        assert bool(field.words) == (field.kind == "word"), field
        assert {field.least, field.most} <= {*paths, None}, field
        assert field.about.endswith("."), field


@pytest.mark.parametrize(("scope", "field"), WRITABLE)
def test_what_can_be_set_is_set_by_a_request_that_the_agent_takes(scope: Scope, field: Field) -> None:
    assert field.write is not None
    topics = Topics("qmpballoon", "edge-7")
    command = topics.parse(f"{topics.place('web1' if scope == 'vm' else None)}/{field.write.topic}")
    assert command is not None
    assert (command.vm is None) == (scope == "host")
    for value in field.words or ("256MiB", "256.0MiB"):
        if field.write.argument is None:
            asked = read_asked(command.verb, scope, Content(bare=value))
        else:
            asked = read_asked(command.verb, scope, Content(arguments={field.write.argument: value}))
        assert command.verb == asked.VERB


def test_some_words_are_problems_and_some_are_not() -> None:
    assert set(NO_PROBLEM) < set(HEALTH_WORDS)
    assert set(PROBLEM_LEVELS) < set(LEVELS)
