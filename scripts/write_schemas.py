"""Writes what is made from the tables of payloads and topics: the schemas, the AsyncAPI document, the events.

A test compares the files with what this writes.

    .venv/bin/python scripts/write_schemas.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from marked_page import filled

from qmpballoon import __version__
from qmpballoon.mqtt.asyncapi import asyncapi_document
from qmpballoon.protocol.event_kinds import HOST_EVENTS, LAGGED, VM_EVENTS, EventKind
from qmpballoon.protocol.fields import HOST_FIELDS, VM_FIELDS, Field
from qmpballoon.protocol.schemas import DRAFT, schemas

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = "docs/mqtt.md"
_MARKED: Final = "<!-- {}: made by scripts/write_schemas.py -->\n"


def files() -> dict[str, str]:
    """Return the text of each file by its path in the repository."""
    document = _text(asyncapi_document(__version__))
    found = {"docs/asyncapi.json": document, "qmpballoon/schemas/asyncapi.json": document}
    for name, schema in schemas().items():
        found[f"qmpballoon/schemas/{name}.json"] = _text({"$schema": DRAFT, "title": name, **schema})
    found[PAGE] = _page()
    return found


def _page() -> str:
    """Return the page with its marked parts made again."""
    parts = {
        "vm": _rows(VM_FIELDS),
        "host": _rows(HOST_FIELDS),
        "vm events": _events(VM_EVENTS),
        "host events": _events((*HOST_EVENTS, LAGGED)),
    }
    return filled(ROOT / PAGE, _MARKED, parts)


def _text(value: Mapping[str, object]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _rows(rows: Iterable[Field]) -> Iterator[str]:
    yield "| key | value | meaning |"
    yield "|---|---|---|"
    for row in rows:
        yield f"| `{row.path}` | {_kind(row)} | {row.about} |"


def _kind(row: Field) -> str:
    words = ", ".join(f"`{word}`" for word in row.words) if 0 < len(row.words) <= 5 else row.kind
    return f"{words} or null" if row.nullable else words


def _events(kinds: Iterable[EventKind]) -> Iterator[str]:
    yield "| event | meaning | data |"
    yield "|---|---|---|"
    for kind in kinds:
        data = "; ".join(f"`{row.path}` ({_kind(row)}): {row.about.rstrip('.')}" for row in kind.data)
        yield f"| `{kind.word}` | {kind.about} | {data} |"


def main() -> None:
    """Write the files; schemas of what is gone are removed."""
    made = files()
    (ROOT / "qmpballoon/schemas").mkdir(exist_ok=True)
    for old in (ROOT / "qmpballoon/schemas").glob("*.json"):
        if old.relative_to(ROOT).as_posix() not in made:
            old.unlink()
    for path, text in made.items():
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
