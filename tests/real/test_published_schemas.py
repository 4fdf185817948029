"""Each thing that a running agent publishes and answers is valid by its schema, and every kind was seen."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from agent_process import MOVED_S, ROOT, AgentWatch, StartAgent, started_online, until
from schema_checks import check_published, validator

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.protocol.schemas import schemas
from qmpballoon.protocol.verbs import VERBS
from qmpballoon.units import MIB

StartGuest = Callable[..., Awaitable[LabGuest]]

REQUESTS: list[tuple[str | None, str, list[dict[str, object]]]] = [
    ("web1", "set-mode", [{"mode": "auto", "for_s": 600}, {"mode": "autoo"}]),
    ("web1", "set-limits", [{"floor": 64 * MIB, "shares": 7}, {}]),
    ("web1", "get", [{}, {"x": 1}]),
    ("web1", "doctor", [{}]),
    ("web1", "why", [{}, {"last": 5}]),
    ("web1", "pulse", [{"keep": "64MiB", "deadline_s": 1}, {"keep": -1}]),
    (None, "list", [{}]),
    (None, "doctor", [{}]),
    (None, "room", [{"size": "1MiB"}, {"size": "4TiB"}]),
    (None, "reclaim", [{"size": "1MiB", "deadline_s": 1}, {"size": "1PiB"}]),
    (None, "release", [{"hold": "hold-1"}, {"hold": "hold-9"}]),
    (None, "set-policy", [{"name": "fixed"}, {"mode": "observe"}, {"mode": "auto"}]),
    (None, "reload", [{}]),
]
EVENTS = {"added", "health", "mode", "limits", "decision", "balloon-change", "stopped", "resumed", "renamed"}
HOST_EVENTS = {"hold", "policy", "mode"}


async def test_everything_that_an_agent_publishes_is_valid(
    broker: LabBroker, start_guest: StartGuest, start_agent: StartAgent, watch: AgentWatch
) -> None:
    guest = await start_guest("web1")
    tables = {"mqtt": {"samples": True, "heartbeat_s": 1}}
    agent = await started_online(start_agent, broker, watch, **tables)
    state = await watch.until_health("web1", "ok")
    target = state["size"] - 32 * MIB
    await watch.do("web1", "set-target", target=target, wait_s=MOVED_S)
    await watch.ask("web1", "set-target", target=1)
    for vm, verb, requests in REQUESTS:
        for arguments in requests:
            await watch.ask(vm, verb, **arguments)
    await guest.monitor.execute("stop")
    await watch.until_events("web1", "stopped")
    await guest.monitor.execute("cont")
    await watch.until_events("web1", "resumed", "balloon-change")
    await until(lambda: watch.received("samples"), what="samples are published")
    agent.configure(**tables, vm={"match": [{"name": "web1", "rename": "web2"}]})
    agent.reload()
    await watch.until_events("web1", "renamed")
    await watch.until_health("web2", "ok")
    await guest.kill()
    await watch.until_health("web2", "offline")
    assert await agent.terminate() == 0
    await watch.until_offline()

    seen: set[str] = set()
    for message in watch.listener.messages:
        topic = message.topic.value
        name = check_published(topic, bytes(message.payload), ROOT)
        if name is not None:
            seen.add(name)
        elif topic.startswith(f"{ROOT}/") and "/request/" not in topic:
            assert not message.payload, f"{topic} has no schema"
    expected = {name for name in schemas() if not name.endswith(".request")}
    assert seen == expected
    answered = {(scope, verb) for scope, verbs in VERBS.items() for verb in verbs}
    assert answered == {("vm" if vm else "host", verb) for vm, verb, _ in REQUESTS} | {("vm", "set-target")}
    assert {event["event"] for event in watch.events("web1")} >= EVENTS
    assert {json.loads(payload)["event"] for payload in watch.received("event")} >= HOST_EVENTS


def test_the_check_itself_refuses_an_unknown_key() -> None:
    assert not validator("vms").is_valid([{"vm": "a", "name": "a", "socket": "a", "health": "ok", "x": 1}])
