"""A fleet in memory for the tests of ``top``: hosts and VMs as a broker would retain them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from textual.app import App

from qmpballoon.errors import QmpBalloonError
from qmpballoon.fleet import Fleet, FleetHost, FleetVm
from qmpballoon.model.records import rfc3339
from qmpballoon.mqtt.topics import FleetTopics
from qmpballoon.units import GIB, MIB


class FakeFleet:
    """A source of the program: what is published here is seen, requests are recorded and answered."""

    def __init__(self, name: str = "mqtt://localhost") -> None:
        self.name = name
        self.problem: str | None = None
        self.has_news = True
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.answers: dict[str, object] = {}  # by verb; an error is raised
        self._fleet = Fleet(FleetTopics("qmpballoon"))

    @property
    def hosts(self) -> Mapping[str, FleetHost]:
        return self._fleet.hosts

    @property
    def vms(self) -> Mapping[str, FleetVm]:
        return self._fleet.vms

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def request(self, target: str, verb: str, /, **arguments: Any) -> object:
        self.requests.append((target, verb, arguments))
        answer = self.answers.get(verb, {})
        if isinstance(answer, QmpBalloonError):
            raise answer
        return answer

    def publish(self, topic: str, payload: object) -> None:
        """Publish below the base: text as it is, other values as JSON, None to clear it."""
        text = payload if isinstance(payload, str) else "" if payload is None else json.dumps(payload)
        self._fleet.take(f"qmpballoon/{topic}", text.encode(), retained=True)
        self.has_news = True

    def host(self, host: str, **document: Any) -> None:
        """Publish a host that is online."""
        self.publish(f"{host}/host", {**HOST, "name": host, "ts": rfc3339(datetime.now(UTC)), **document})
        self.publish(f"{host}/status", "online")

    def vm(self, host: str, vm: str, **document: Any) -> None:
        """Publish a VM that is online."""
        self.publish(f"{host}/vm/{vm}/state", vm_document(**{"name": vm, **document}))
        self.publish(f"{host}/vm/{vm}/availability", "online")


HOST: Mapping[str, Any] = {
    "version": "0.1.0",
    "heartbeat_s": 60,
    "policy": "fairshare",
    "mode": "auto",
    "level": "ok",
    "budget": 6 * GIB,
    "reserve": 512 * MIB,
    "used": 3 * GIB,
    "available": 3 * GIB,
    "mem_total": 8 * GIB,
    "mem_available": 4 * GIB,
    "room": 2 * GIB,
    "reclaimable": GIB,
    "alarms": [],
}


def vm_document(**changed: Any) -> dict[str, Any]:
    """Return a VM object; ``available`` is its guest's."""
    available = changed.pop("available", 69 * MIB)
    document: dict[str, Any] = {
        "run_state": "running",
        "size": 256 * MIB,
        "actual": 180 * MIB,
        "target": 180 * MIB,
        "floor": 64 * MIB,
        "ceiling": 256 * MIB,
        "mode": "auto",
        "policy": "fairshare",
        "why": "at-rest",
        "health": "ok",
        "rss": 190 * MIB,
        "guest": {
            "total": 228 * MIB,
            "free": 60 * MIB,
            "available": available,
            "caches": 2 * MIB,
            "age_s": 0.4,
        },
        **changed,
    }
    if "held" not in document:
        held = None if available is None or document["actual"] is None else document["actual"] - available
        document["held"] = held
    return document


def screen_lines(app: App[None]) -> list[str]:
    """Return what is on a program's terminal, line by line."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip).ljust(app.size.width) for strip in strips]


def screen_text(app: App[None]) -> str:
    """Return what is on a program's terminal."""
    return "\n".join(screen_lines(app))
