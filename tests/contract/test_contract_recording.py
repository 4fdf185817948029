"""The simulated QEMU replies as each recorded real one, and the installed one as its recording."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from both_qemus import Start, Version, Wire, installed_version, running
from exchanges import EXCHANGES, without_volatile

from qmpballoon.sim.qemu.dialect import DIALECTS
from qmpballoon.sim.qemu.server import SimulatedQemu

RECORDINGS = Path(__file__).parent / "recordings"

Step = dict[str, Any]  # a text that was sent, and the messages received after it
Recording = list[tuple[Step, list[Step]]]  # per exchange: its first line, and its steps


def exchanges(lines: str) -> Iterator[tuple[Step, list[Step]]]:
    for line in map(json.loads, lines.splitlines()):
        if "exchange" in line:
            first, steps = line, list[Step]()
            yield first, steps  # the loop fills ``steps`` before the next exchange begins
        else:
            steps.append(line)


def version_of(file: Path) -> Version:
    major, minor = file.stem.removeprefix("qemu-").split(".")
    return int(major), int(minor), 0


RECORDED: dict[Version, Recording] = {
    version_of(file): list(exchanges(file.read_text())) for file in RECORDINGS.glob("*.jsonl")
}
BY_VERSION = [
    pytest.param(version, first, steps, id=f"{version[0]}.{version[1]}-{first['exchange'].replace(' ', '-')}")
    for version, recording in sorted(RECORDED.items())
    for first, steps in recording
]


def test_every_dialect_has_a_recording_of_every_exchange() -> None:
    assert {version[:2] for version in RECORDED} == set(DIALECTS)
    for recording in RECORDED.values():
        assert [first["exchange"] for first, _ in recording] == [each.name for each in EXCHANGES]
        assert [[line["sent"] for line in steps[1:]] for _, steps in recording] == [
            list(each.requests) for each in EXCHANGES
        ]


async def next_messages(wire: Wire, count: int) -> list[Any]:
    """Return the next messages without volatile values; None for the end of the connection."""
    messages: list[Any] = []
    for _ in range(count):
        line = await wire.line()
        messages.append(without_volatile(json.loads(line)) if line else None)
    return messages


@pytest.mark.parametrize(("version", "first", "steps"), BY_VERSION)
async def test_the_simulated_qemu_replies_as_recorded(
    version: Version, first: Step, steps: list[Step], sockets_dir: Path
) -> None:
    guest, machine = Start(**first["start"]).specs(version)
    path = sockets_dir / "simulated.qmp"
    async with SimulatedQemu(path, guest=guest, machine=machine), Wire.connected(path) as wire:
        for step in steps:
            wire.send(step["sent"].encode())
            assert await next_messages(wire, len(step["received"])) == step["received"], step["sent"]


FIRMWARE_RESETS = {
    "timestamp": {"seconds": "<int>", "microseconds": "<int>"},
    "event": "RESET",
    "data": {"guest": True, "reason": "guest-reset"},
}


async def messages_without_firmware_resets(wire: Wire, count: int) -> list[Any]:
    """Return the next messages without the firmware's resets: none, one or two come, at any time."""
    messages: list[Any] = []
    while len(messages) < count:
        messages += [message for message in await next_messages(wire, 1) if message != FIRMWARE_RESETS]
    return messages


@pytest.mark.parametrize("name", [each.name for each in EXCHANGES])
async def test_the_installed_qemu_replies_as_recorded(name: str, sockets_dir: Path) -> None:
    major, minor, _ = installed_version()
    recording = RECORDED.get((major, minor, 0), [])
    assert recording, f"QEMU {major}.{minor} was not recorded: run tests/contract/record.py with it"
    [(first, steps)] = [each for each in recording if each[0]["exchange"] == name]
    path = sockets_dir / "real.qmp"
    async with running("real", path, Start(**first["start"])), Wire.connected(path) as wire:
        for step in steps:
            wire.send(step["sent"].encode())
            expected = [message for message in step["received"] if message != FIRMWARE_RESETS]
            assert await messages_without_firmware_resets(wire, len(expected)) == expected, step["sent"]
