"""A state file with any content is read, or refused with ValueError."""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import suppress
from dataclasses import fields
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qmpballoon.agent.state_file import Kept, KnownSocket, parse_state
from qmpballoon.agent.store import Store
from qmpballoon.model.names import VmId
from qmpballoon.model.records import MODES

TEXT = st.text(st.characters(), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
KEPT_ROWS = st.dictionaries(st.sampled_from([entry.name for entry in fields(Kept)]), JSON, max_size=5)
ALMOST = st.fixed_dictionaries(
    {
        "version": st.just(1) | JSON,
        "sockets": st.dictionaries(
            TEXT, st.fixed_dictionaries({"vm": TEXT, "base": TEXT, "name": TEXT | JSON}), max_size=3
        )
        | JSON,
        "vms": st.dictionaries(TEXT, KEPT_ROWS | JSON, max_size=3) | JSON,
        "announced": st.lists(TEXT) | JSON,
    }
)


@settings(max_examples=60)
@given(st.text() | JSON.map(json.dumps) | ALMOST.map(json.dumps))
def test_any_text_is_a_state_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        contents = parse_state(text)
        assert all(isinstance(known, KnownSocket) for known in contents.sockets.values())
        assert all(kept.mode in (None, *MODES) for kept in contents.vms.values())
        assert all(isinstance(topic, str) for topic in contents.announced)


ROWS = st.dictionaries(TEXT.filter(lambda key: key != "good"), JSON | KEPT_ROWS, max_size=4)


@settings(max_examples=60)
@given(sockets=ROWS, vms=ROWS, announced=st.lists(JSON, max_size=4), others=st.dictionaries(TEXT, JSON))
def test_an_invalid_row_does_not_affect_other_rows(
    sockets: dict[str, Any], vms: dict[str, Any], announced: list[Any], others: dict[str, Any]
) -> None:
    known, kept = {"vm": "a", "base": "a", "name": "a"}, {"mode": "manual", "target": 1}
    tree = {
        **others,
        "version": 1,
        "sockets": {**sockets, "good": {**others, **known, "owner": None}},
        "vms": {**vms, "good": {**kept, "unknown": others}},
        "announced": [*announced, "good"],
    }
    contents = parse_state(json.dumps(tree))
    assert contents.sockets["good"] == KnownSocket("a", "a", "a")
    assert contents.vms["good"] == Kept(mode="manual", target=1)
    assert contents.announced == [topic for topic in announced if isinstance(topic, str)] + ["good"]
    rows = len(sockets) + len(vms) + len(announced)
    taken = len(contents.sockets) + len(contents.vms) + len(contents.announced) - 3
    unread = [one for one in contents.unread if not one.startswith(("policy", "mode"))]
    assert taken + len(unread) == rows


KEPT = st.builds(
    Kept,
    mode=st.none() | st.sampled_from(MODES),
    mode_until=st.none() | st.floats(0, 1e9),
    floor=st.none() | st.sampled_from(["25%", "512MiB", "4096"]),
    shares=st.none() | st.integers(1, 10**6),
    target=st.none() | st.integers(1, 2**53),
    life=st.none() | TEXT,
    sent=st.none() | st.integers(1, 2**53),
)
SOCKETS = st.dictionaries(
    TEXT,
    st.builds(KnownSocket, vm=st.from_regex("[A-Za-z0-9_-]{1,64}", fullmatch=True), base=TEXT, name=TEXT),
    max_size=4,
)


@settings(max_examples=25)
@given(SOCKETS, st.dictionaries(TEXT, KEPT, max_size=4), st.lists(TEXT, max_size=4))
def test_a_written_state_is_read_back(
    sockets: dict[str, KnownSocket], vms: dict[str, Kept], announced: list[str]
) -> None:
    async def write_and_read() -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = Store(directory, "edge-7")
            for path, known in sockets.items():
                store.know(path, known)
            for vm, kept in vms.items():
                store.keep(VmId(vm), **{entry.name: getattr(kept, entry.name) for entry in fields(Kept)})
            store.announce(announced)
            await store.close()
            again = Store(directory, "edge-7")
            await again.close()
            assert again.sockets == sockets
            assert {vm: again.kept(VmId(vm)) for vm in vms} == vms
            assert again.announced == announced

    asyncio.run(write_and_read())
