"""JSON Schemas of all payloads, and an AsyncAPI document of all topics. Pure.

They are made from the same tables as the rest: `fields` for the objects, `event_kinds`, and the readers of
the verbs' arguments. `scripts/write-schemas` writes them to files, and a test compares these.

A schema allows more keys than it names: keys are added while ``schema`` is 1. A request has no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import groupby
from typing import Any, Final, TypeAlias

from qmpballoon.errors import ERROR_WORDS
from qmpballoon.model.records import HEALTH_WORDS, MODES, POLICIES
from qmpballoon.policy.decided import FIGURES
from qmpballoon.policy.reasons import WORDS
from qmpballoon.protocol.event_kinds import HOST_EVENTS, VM_EVENTS, EventKind
from qmpballoon.protocol.fields import HOST_FIELDS, VM_FIELDS, Field
from qmpballoon.protocol.objects import SCHEMA
from qmpballoon.protocol.verbs import VERBS, Asked, Scope, bare_argument
from qmpballoon.readers import schema_of

Schema: TypeAlias = dict[str, Any]

DRAFT: Final = "http://json-schema.org/draft-07/schema#"

_TEXT: Final[Schema] = {"type": "string"}
_BYTES: Final[Schema] = {"type": "integer", "minimum": 0}
_FLAG: Final[Schema] = {"type": "boolean"}
_STAMP: Final[Schema] = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$",
}
_KINDS: Final[Mapping[str, Schema]] = {
    "bytes": _BYTES,
    "percent": {"type": "number", "minimum": 0, "maximum": 100},
    "seconds": {"type": "number", "minimum": 0},
    "whole": {"type": "integer"},
    "counter": {"type": "integer", "minimum": 0},
    "text": _TEXT,
    "flag": _FLAG,
    "stamp": _STAMP,
    "list": {"type": "array"},
    "object": {"type": "object"},
}


def _object(properties: Mapping[str, Schema], *, optional: Iterable[str] = ()) -> Schema:
    required = [name for name in properties if name not in set(optional)]
    return {"type": "object", "properties": dict(properties), **({"required": required} if required else {})}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _word(*words: str) -> Schema:
    return {"enum": list(words)}


def _maybe(schema: Schema) -> Schema:
    """Return the schema of a value that may be null."""
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


_ITEMS: Final[Mapping[str, Schema]] = {
    "overridden": _word("floor", "ceiling", "shares"),
    "unidentified": _object({"socket": _TEXT, "reason": _TEXT}),
    "holds": _object({"hold": _TEXT, "size": _BYTES, "left_s": _KINDS["seconds"]}),
    "alarms": _TEXT,
}
"""Of the lists in `fields`, by path."""


def _field(field: Field) -> Schema:
    schema = _word(*field.words) if field.kind == "word" else dict(_KINDS[field.kind])
    if field.path == "schema":
        schema = {"const": SCHEMA}
    if field.path in _ITEMS:
        schema["items"] = _ITEMS[field.path]
    if field.nullable:
        schema = _maybe(schema)
    unit = {"bytes": "bytes", "percent": "%", "seconds": "s"}.get(field.kind)
    return {**schema, "description": field.about, **({"x-unit": unit} if unit else {})}


def _fields(rows: Sequence[Field], *, optional: Iterable[str] = ()) -> Schema:
    """Return the schema of an object of rows; paths with a dot are those of an object in it."""
    properties: dict[str, Schema] = {}
    for first, group in groupby(rows, key=lambda row: row.path.partition(".")[0]):
        inside = list(group)
        if inside[0].path == first:
            properties[first] = _field(inside[0])
        else:
            properties[first] = _object({row.path.partition(".")[2]: _field(row) for row in inside})
    return _object(properties, optional=optional)


_CUT: Final[Schema] = {
    **_list(_TEXT),
    "description": "Only where the broker takes no larger message: keys whose lists or objects were emptied.",
}


def _retained(rows: Sequence[Field]) -> Schema:
    schema = _fields(rows)
    schema["properties"]["cut"] = _CUT
    return schema


def _event_data(kind: EventKind) -> Schema:
    schema = _fields(kind.data, optional=kind.optional)
    return {**schema, "additionalProperties": True} if kind.is_open else schema


def _event(kinds: Sequence[EventKind], vm: Schema) -> Schema:
    """Return the schema of an event; readers ignore the words that they do not know."""
    head = _object(
        {
            "schema": {"const": SCHEMA},
            "ts": _STAMP,
            "vm": vm,
            "event": {**_TEXT, "examples": [kind.word for kind in kinds]},
            "data": {"type": "object"},
        }
    )
    return {
        **head,
        "allOf": [
            {
                "if": {"properties": {"event": {"const": kind.word}}},
                "then": {
                    "description": kind.about,
                    "properties": {"data": _event_data(kind)},
                },
            }
            for kind in kinds
        ],
    }


VM: Final = _retained(VM_FIELDS)
HOST: Final = _retained(HOST_FIELDS)
_GUEST: Final[Schema] = VM["properties"]["guest"]
_NAMES: Final[Mapping[str, Schema]] = {"vm": _TEXT, "name": _TEXT}
VMS: Final = _list(_object({**_NAMES, "socket": _TEXT, "health": _word(*HEALTH_WORDS)}))
SAMPLES: Final = _object(
    {
        "schema": {"const": SCHEMA},
        "ts": _STAMP,
        "host": _object(
            {key: HOST["properties"][key] for key in ("mem_available", "psi_some_avg10", "psi_full_avg10")}
        ),
        "vms": _map(
            _object({**{key: VM["properties"][key] for key in ("actual", "target", "rss")}, "guest": _GUEST})
        ),
    }
)
AVAILABILITY: Final = _word("online", "offline")

_FIGURES: Final = _object({name: _maybe({"type": "integer"}) for name in FIGURES})
_FINDING: Final = _object(
    {
        "word": _TEXT,
        "severity": _word("error", "warning", "note"),
        "seen": _TEXT,
        "means": _TEXT,
        "mend": _TEXT,
    }
)
_FEATURE: Final = _maybe(_word("on", "offered", "refused", "not-offered"))
_EXAMINATION: Final[Mapping[str, Schema]] = {"findings": _list(_FINDING), "not_told": _list(_TEXT)}
_CAN: Final = _object(
    {
        **{key: _maybe(_FLAG) for key in ("balloon", "driver", "statistics", "frees")},
        **dict.fromkeys(("deflate_on_oom", "free_page_reporting"), _FEATURE),
    }
)
_WHY: Final = _object(
    {
        "schema": {"const": SCHEMA},
        "ts": _STAMP,
        **{
            key: VM["properties"][key]
            for key in ("vm", "name", "mode", "policy", "health", "why", "why_since", "target")
        },
        "figures": _FIGURES,
        "decisions": _list(
            _object(
                {
                    "ts": _STAMP,
                    "why": _word(*WORDS),
                    "outcome": _word("sent", "observed", "failed", "held"),
                    "policy": _maybe(_word(*POLICIES)),
                    "to": _maybe(_BYTES),
                    "figures": _FIGURES,
                }
            )
        ),
    }
)
_LIMITS: Final[Mapping[str, Schema]] = {
    "floor": _maybe(_BYTES),
    "ceiling": _maybe(_BYTES),
    "shares": {"type": "integer"},
}

RESULTS: Final[Mapping[tuple[Scope, str], Schema]] = {
    ("vm", "set-target"): _object({"target": _BYTES, "actual": _maybe(_BYTES), "reached": _FLAG}),
    ("vm", "set-mode"): _object({"mode": _word(*MODES), "for_s": _maybe(_KINDS["seconds"])}),
    ("vm", "set-limits"): _object(_LIMITS),
    ("vm", "get"): _fields(VM_FIELDS),
    ("vm", "doctor"): _object({**_EXAMINATION, "can": _CAN, "qemu": _maybe(_TEXT)}),
    ("vm", "why"): _WHY,
    ("vm", "pulse"): _object({"freed": _maybe(_BYTES), "rss": _maybe(_BYTES)}),
    ("host", "doctor"): _object(_EXAMINATION),
    ("host", "list"): _list(
        _object(
            {
                **_NAMES,
                "health": _word(*HEALTH_WORDS),
                "mode": _word(*MODES),
                "size": _maybe(_BYTES),
                "actual": _maybe(_BYTES),
            }
        )
    ),
    ("host", "room"): _object({"room": _BYTES, "fits": _FLAG, "headroom": {"type": "integer"}}),
    ("host", "reclaim"): _object(
        {"freed": _BYTES, "hold": _TEXT, "gave": _map(_BYTES), "refused": _map(_TEXT)}
    ),
    ("host", "release"): _object({"hold": _TEXT, "size": _BYTES}),
    ("host", "set-policy"): _object({"name": _word(*POLICIES), "mode": _word(*MODES)}),
    ("host", "reload"): _object({"reloaded": _FLAG, "restart_needed": _list(_TEXT)}),
}
"""The results of the verbs."""


def request_schema(kind: type[Asked]) -> Schema:
    """Return the schema of a verb's request: an object, or the one value that may be sent alone."""
    known = {each.name: each for each in fields(kind)}
    arguments: dict[str, Schema] = {}
    for name, each in known.items():
        schema: Schema = dict(schema_of(each.metadata["read"]))
        arguments[name] = schema if each.default is MISSING else _maybe(schema)
    required = [name for name, each in known.items() if each.default is MISSING]
    transaction = {"description": "Any JSON value of up to 256 bytes; the answer has it."}
    whole: Schema = {
        "type": "object",
        "description": (kind.__doc__ or "").strip(),
        "properties": {"transaction": transaction, **arguments},
        "required": required,
        "additionalProperties": False,
    }
    if kind.NEEDS_SOME:
        whole["anyOf"] = [{"required": [name]} for name in known]
    bare = bare_argument(kind)
    if bare is None:
        return whole
    return {"anyOf": [whole, {**schema_of(known[bare].metadata["read"]), "title": f"{bare} alone"}]}


def response_schema(scope: Scope, verb: str, result: Schema | None = None) -> Schema:
    """Return the schema of the answers to a verb."""
    return _object(
        {
            "transaction": {"description": "That of the request; null if it had none."},
            "vm": _TEXT if scope == "vm" else {"type": "null"},
            "verb": {"const": verb},
            "status": _word("ok", "error"),
            "result": _maybe(RESULTS.get((scope, verb), {}) if result is None else result),
            "error": _maybe(_object({"code": _word(*ERROR_WORDS), "message": _TEXT})),
            "ts": _STAMP,
        }
    )


def schemas() -> dict[str, Schema]:
    """Return the schema of each payload by name: ``vm``, ``vm-event``, ``vm.set-target.request`` …"""
    found: dict[str, Schema] = {
        "vm": VM,
        "host": HOST,
        "vms": VMS,
        "samples": SAMPLES,
        "availability": AVAILABILITY,
        "vm-event": _event(VM_EVENTS, _TEXT),
        "host-event": _event(HOST_EVENTS, {"type": "null"}),
    }
    for scope, verbs in VERBS.items():
        for verb, kind in verbs.items():
            found[f"{scope}.{verb}.request"] = request_schema(kind)
            found[f"{scope}.{verb}.response"] = response_schema(scope, verb)
    return found
