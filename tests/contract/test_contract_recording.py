"""The pretended QEMU says what the real one was recorded to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from both_qemus import Start, Wire
from conversations import CONVERSATIONS, without_volatile

from qmpballoon.sim.qemu.server import SimulatedQemu

RECORDINGS = sorted(Path(__file__).parent.joinpath("recordings").glob("*.jsonl"))


def conversations(recording: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for line in map(json.loads, recording.read_text().splitlines()):
        if "conversation" in line:
            first, said = line, list[dict[str, Any]]()
            yield first, said  # said fills up until the generator goes on
        else:
            said.append(line)


RECORDED = [entry for recording in RECORDINGS for entry in list(conversations(recording))]


def test_the_recordings_hold_every_conversation_that_is_written_down() -> None:
    assert [first["conversation"] for first, _ in RECORDED] == [each.name for each in CONVERSATIONS]
    assert [[line["say"] for line in said[1:]] for _, said in RECORDED] == [
        list(each.says) for each in CONVERSATIONS
    ]


@pytest.mark.parametrize(
    ("first", "said"), RECORDED, ids=[first["conversation"].replace(" ", "-") for first, _ in RECORDED]
)
async def test_a_recorded_conversation_comes_out_the_same(
    first: dict[str, Any], said: list[dict[str, Any]], sockets_dir: Path
) -> None:
    guest, machine = Start(**first["start"]).specs()
    path = sockets_dir / "pretended.qmp"
    async with SimulatedQemu(path, guest=guest, machine=machine), Wire.connected(path) as wire:
        for step in said:
            wire.send(step["say"].encode())
            heard = []
            for expected in step["hear"]:
                line = await wire.line()
                heard.append(without_volatile(json.loads(line)) if expected is not None else line or None)
            assert heard == step["hear"], step["say"]
