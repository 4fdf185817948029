"""The simulated QEMU says what each real one was recorded to say; the installed one says so still."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from both_qemus import Start, Version, Wire, installed_version, running
from conversations import CONVERSATIONS, without_volatile

from qmpballoon.sim.qemu.dialect import DIALECTS
from qmpballoon.sim.qemu.server import SimulatedQemu

RECORDINGS = Path(__file__).parent / "recordings"

Step = dict[str, Any]  # what was said, and what was heard
Recording = list[tuple[Step, list[Step]]]  # per conversation: its first line, and its steps


def conversations(lines: str) -> Iterator[tuple[Step, list[Step]]]:
    for line in map(json.loads, lines.splitlines()):
        if "conversation" in line:
            first, said = line, list[Step]()
            yield first, said  # said fills up until the generator goes on
        else:
            said.append(line)


def version_of(file: Path) -> Version:
    major, minor = file.stem.removeprefix("qemu-").split(".")
    return int(major), int(minor), 0


RECORDED: dict[Version, Recording] = {
    version_of(file): list(conversations(file.read_text())) for file in RECORDINGS.glob("*.jsonl")
}
BY_VERSION = [
    pytest.param(
        version, first, said, id=f"{version[0]}.{version[1]}-{first['conversation'].replace(' ', '-')}"
    )
    for version, recording in sorted(RECORDED.items())
    for first, said in recording
]


def test_every_dialect_has_a_recording_of_every_exchange() -> None:
    assert {version[:2] for version in RECORDED} == set(DIALECTS)
    for recording in RECORDED.values():
        assert [first["conversation"] for first, _ in recording] == [each.name for each in CONVERSATIONS]
        assert [[line["say"] for line in said[1:]] for _, said in recording] == [
            list(each.says) for each in CONVERSATIONS
        ]


async def heard(wire: Wire, count: int) -> list[Any]:
    """Return so many messages without what is volatile; None for the end."""
    messages: list[Any] = []
    for _ in range(count):
        line = await wire.line()
        messages.append(without_volatile(json.loads(line)) if line else None)
    return messages


@pytest.mark.parametrize(("version", "first", "said"), BY_VERSION)
async def test_the_simulated_qemu_replies_as_recorded(
    version: Version, first: Step, said: list[Step], sockets_dir: Path
) -> None:
    guest, machine = Start(**first["start"]).specs(version)
    path = sockets_dir / "simulated.qmp"
    async with SimulatedQemu(path, guest=guest, machine=machine), Wire.connected(path) as wire:
        for step in said:
            wire.send(step["say"].encode())
            assert await heard(wire, len(step["hear"])) == step["hear"], step["say"]


FIRMWARE_RESETS = {
    "timestamp": {"seconds": "<int>", "microseconds": "<int>"},
    "event": "RESET",
    "data": {"guest": True, "reason": "guest-reset"},
}


async def heard_of_qemu(wire: Wire, count: int) -> list[Any]:
    """Return so many messages, but not the firmware's resets: none, one or two come, when it likes."""
    messages: list[Any] = []
    while len(messages) < count:
        messages += [message for message in await heard(wire, 1) if message != FIRMWARE_RESETS]
    return messages


@pytest.mark.parametrize("name", [each.name for each in CONVERSATIONS])
async def test_the_installed_qemu_replies_as_recorded(name: str, sockets_dir: Path) -> None:
    major, minor, _ = installed_version()
    recording = RECORDED.get((major, minor, 0), [])
    assert recording, f"QEMU {major}.{minor} was not recorded: run tests/contract/record.py with it"
    [(first, said)] = [each for each in recording if each[0]["conversation"] == name]
    path = sockets_dir / "real.qmp"
    async with running("real", path, Start(**first["start"])), Wire.connected(path) as wire:
        for step in said:
            wire.send(step["say"].encode())
            expected = [message for message in step["hear"] if message != FIRMWARE_RESETS]
            assert await heard_of_qemu(wire, len(expected)) == expected, step["say"]
