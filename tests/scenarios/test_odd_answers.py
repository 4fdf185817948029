"""A QEMU that answers in the right form, and says anything: the agent goes on, and is right once it is."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from agent_harness import QUICK, Qemus, running_agent

from qmpballoon.errors import QmpBalloonError
from qmpballoon.sim.qemu import server
from qmpballoon.sim.qemu.messages import encode
from qmpballoon.units import MIB

ODD_MESSAGES: Final = 150  # before it comes to its senses
ODD: Final[list[Any]] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**53 + 1, 2**64 - 1, 1e308, -0.5, "", "x" * 300, "\0\n"),
    *([], {}, [1], {"a": 1}, [{}], [[]], "child<virtio-balloon-pci>"),
    *("running", "paused", "inmigrate", "postmigrate", "shutdown", "active"),
]
EVENTS: Final = (
    *("RESET", "STOP", "RESUME", "SHUTDOWN", "MIGRATION", "BALLOON_CHANGE", "DEVICE_DELETED", "SUSPEND"),
    *("WAKEUP", "POWERDOWN", "GUEST_PANICKED", "MEMORY_DEVICE_SIZE_CHANGE", "WATCHDOG", "NEW_IN_QEMU_99"),
)
DETAILS: Final = {
    "actual": 200 * MIB,
    "path": "/machine/peripheral/balloon0",
    "status": "active",
    "guest": True,
}
REQUESTS: Final[list[tuple[str, dict[str, Any]]]] = [
    ("set-target", {"target": 200 * MIB}),
    ("get", {}),
    ("set-mode", {"mode": "auto"}),
    ("pulse", {"deadline_s": 1}),
    ("doctor", {}),
]


class Oddness:
    """Changes what is sent, by the dice of a seed, a number of times."""

    def __init__(self, seed: int) -> None:
        self.left = ODD_MESSAGES
        self._dice = random.Random(seed)
        self._part = self._dice.choice([0.01, 0.03, 0.1, 0.3])

    def encode(self, message: Mapping[str, Any]) -> bytes:
        if self.left <= 0 or "QMP" in message or message.get("id") == 0:
            return encode(message)
        self.left -= 1
        event = b""
        if self._dice.random() < self._part:
            details = {key: self._changed(value, 0.2) for key, value in DETAILS.items()}
            event = encode({"timestamp": {}, "event": self._dice.choice(EVENTS), "data": details})
        if "return" in message:
            message = {**message, "return": self._changed(message["return"], self._part)}
        line = encode(message)
        return event + line if self._dice.random() < 0.5 else line + event

    def _changed(self, value: Any, part: float) -> Any:
        if self._dice.random() < part:
            return copy.deepcopy(self._dice.choice(ODD))
        if isinstance(value, dict):
            return {
                key: self._changed(each, part) for key, each in value.items() if self._dice.random() > part
            }
        if isinstance(value, list):
            return [
                self._changed(each, part) for each in value for _ in range(self._dice.choice([1, 1, 1, 2]))
            ]
        return value


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_a_qemu_answers_the_agent_goes_on(
    seed: int, qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, dice = Oddness(seed), random.Random(seed)
    monkeypatch.setattr(server, "encode", odd.encode)
    await qemus.start("web1")
    async with running_agent(sockets_dir, monkeypatch, settings=replace(QUICK, qmp_timeout_s=1.0)) as harness:
        while odd.left > 0:
            for vm in harness.ids:
                verb, arguments = dice.choice(REQUESTS)
                with suppress(QmpBalloonError, TimeoutError):
                    async with asyncio.timeout(0.5):
                        await harness.ask(vm, verb, **arguments)
            await harness.until(lambda left=odd.left: odd.left <= max(0, left - 1))  # type: ignore[misc]
        # Its name may have been odd, too.
        await harness.until(lambda: any(harness.health(vm) == "ok" for vm in harness.ids))
        assert all(record.size == 256 * MIB for record in harness.records.values() if record.health == "ok")
